"""The memory's kernels, interpreted on the CPU, against the torch back end in float64."""

from dataclasses import replace

import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.ops import MemoryState, dispatch, dissipative_memory
from resolvent.ops.memory_rotation import accumulate_phases

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU: see test_hebbian_cuda.py", allow_module_level=True)
from resolvent.ops.triton import hebbian as kernels
from resolvent.ops.triton import segments
from resolvent.ops.triton.arguments import parts_of
from tests.ops.errors import relative
from tests.ops.test_hebbian import KINDS, at, consolidation, inputs, state, tensors_of

DECAYS = {"weak": 1e-3, "middling": 0.3, "strong": 1000.0}
NAMES = ["q", "k", "v", "decay", "eta", "memory", "forgetting"]


def single(x):
    return x.detach().float().requires_grad_(x.requires_grad)


def single_rule(rule):
    if rule is None:
        return rule
    snr, resonance = rule.snr, rule.resonance
    if snr is not None and snr.strength is not None:
        snr = replace(snr, strength=single(snr.strength))
    if resonance is not None:
        basis, sharpness, bias = (single(x) for x in (resonance.basis, resonance.sharpness, resonance.bias))
        resonance = replace(resonance, basis=basis, sharpness=sharpness, bias=bias)
    return replace(rule, snr=snr, resonance=resonance)


def run(values, start, rule, position, offsets=None, **options):
    """Read-out, final state and the gradients of everything, from a loss that looks at both."""
    readout, final = dissipative_memory(
        *values, initial_state=start, position=position, cu_seqlens=offsets, consolidation=rule, **options
    )
    weights = torch.cos(torch.arange(readout.numel(), dtype=torch.float64)).view_as(readout)
    loss = (readout.double() * weights).sum() + sum(x.double().square().sum() for x in final)
    sources = [*values, *(start or ()), *tensors_of(rule)]
    return [readout, *final], torch.autograd.grad(loss, sources, materialize_grads=True)


def check(values, start=None, rule=None, position=None, offsets=None):
    """Everything the kernels compute against float64."""
    values = [x.requires_grad_() for x in values]
    start = MemoryState(*(x.requires_grad_() for x in start)) if start else None
    expected, gradients = run(values, start, rule, position, offsets)
    narrow = [single(x) for x in values]
    narrow_start = MemoryState(*(single(x) for x in start)) if start else None
    found, found_gradients = run(narrow, narrow_start, single_rule(rule), position, offsets, backend="triton")
    assert all(relative(a.double(), b) <= 1e-6 for a, b in zip(found, expected, strict=True))
    names = [*NAMES[: 7 if start else 5], *(f"parameter {i} of the rule" for i in range(len(tensors_of(rule))))]
    for name, a, b in zip(names, found_gradients, gradients, strict=True):
        # Where everything was forgotten, the gradient of how much was forgotten is nothing: exp(-40) of the others.
        assert relative(a.double(), b) <= 1e-5 or (a.double() - b).norm() <= 1e-12, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_kernels_are_the_reference_gradients_included(length, kind):
    check(inputs(length), state(), consolidation(kind), torch.full((2,), 37))


@pytest.mark.parametrize("strength", ["weak", "strong"])
@pytest.mark.parametrize("kind", ["none", "both"])
def test_weak_and_strong_decay(kind, strength):
    check(inputs(150, DECAYS[strength]), state(), consolidation(kind), torch.tensor([0, 100]))


def test_from_an_empty_memory():
    check(inputs(150), rule=consolidation("both"))


def test_without_a_strength_the_filter_acts_fully():
    values, start = [single(x).requires_grad_() for x in inputs(150)], MemoryState(*(single(x) for x in state()))
    start = MemoryState(*(x.requires_grad_() for x in start))
    position = torch.tensor([0, 9])
    (found, of_found), (fully, of_fully) = (
        run(values, start, at(strength), position, backend="triton")
        for strength in (torch.ones(2, requires_grad=True), None)
    )
    for a, b in zip([*found, *of_found[:7]], [*fully, *of_fully], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_long_intervals_start_anywhere():
    check(inputs(200), state(), consolidation("both", interval=128), torch.tensor([0, 100]))


@pytest.mark.parametrize(("key", "value"), [(24, 8), (16, 40), (128, 16)])
def test_any_width_of_a_head(key, value):
    check(inputs(70, key=key, value=value), state(key=key, value=value), consolidation("both", key=key))


@pytest.mark.parametrize("kind", ["none", "both"])
def test_packed_sequences(kind):
    lengths = [0, 5, 64, 100, 1, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.tensor([3, 60, 64, 127, 63, 0])
    check(inputs(sum(lengths), batch=1), state(batch=6), consolidation(kind), positions, offsets)


@pytest.mark.parametrize("packed", [False, True])
def test_parallel_segments_equal_one_walk(packed, monkeypatch):
    monkeypatch.setattr(segments, "_SHORTEST_SEGMENT", 2)
    offsets = torch.tensor([0, 300, 300, 310, 600]) if packed else None
    layout = segments.layout_of(torch.empty(1 if packed else 2, 600, 2, 16), None, offsets, 0)
    assert layout.segmented
    check(inputs(600, 0.01, batch=1 if packed else 2), state(batch=4 if packed else 2), offsets=offsets)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "interval"), [("both", 64), ("both", 128), ("snr", 192), ("resonance", 128)])
def test_segments_meet_at_boundaries(kind, interval, packed, monkeypatch):
    monkeypatch.setattr(segments, "_SHORTEST_SEGMENT", 2)
    lengths = [0, 5, 195, 1, 99] if packed else [300, 300]
    position = torch.tensor([7, 50, 100, 127, 0] if packed else [0, 100])
    offsets = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    values, start = inputs(300, batch=1 if packed else 2), state(len(lengths))
    assert segments.layout_of(values[0], position, offsets, interval).segmented
    check(values, start, consolidation(kind, interval=interval), position, offsets)


@pytest.mark.parametrize("phase", [0, 100])
def test_segments_read_without_a_gradient(phase, monkeypatch):
    monkeypatch.setattr(segments, "_SHORTEST_SEGMENT", 1)
    rule, values, start = consolidation("both", interval=128), inputs(300), state()
    position = torch.tensor([phase, 0])
    narrow = MemoryState(*(single(x) for x in start))
    with torch.no_grad():
        expected, of_expected = dissipative_memory(*values, initial_state=start, position=position, consolidation=rule)
        found, of_found = dissipative_memory(
            *(single(x) for x in values), initial_state=narrow, position=position, consolidation=single_rule(rule),
            backend="triton",
        )  # fmt: skip
    for a, b in zip([found, *of_found], [expected, *of_expected], strict=True):
        assert relative(a.double(), b) <= 1e-6


def test_segments_end_where_boundaries_lie():
    rows = segments._layout((300,), (100,), 2, 192, torch.device("cpu")).segments
    assert rows[:, :2].tolist() == [[0, 92], [92, 220], [220, 284], [284, 300]]
    assert rows[:, 4].tolist() == [1, 0, 2, 0]  # chunks since the last boundary


def test_rotated_queries_and_keys():
    values, start = [x.requires_grad_() for x in inputs(150)], state()
    turns = (torch.rand(2, 150, 8, dtype=torch.float64) - 0.5).requires_grad_()

    def outcome(given, before, backend):
        phases, _ = accumulate_phases(turns, torch.zeros(2, 8, dtype=torch.float64))
        readout, final = dissipative_memory(*given, initial_state=before, phases=phases, backend=backend)
        loss = readout.double().square().sum() + final.memory.double().square().sum()
        return readout, *torch.autograd.grad(loss, [*given, turns])

    expected = outcome(values, start, "torch")
    found = outcome([single(x) for x in values], MemoryState(*(single(x) for x in start)), "triton")
    for a, b in zip(found, expected, strict=True):
        assert relative(a.double(), b) <= 1e-5


def test_strided_inputs():
    packed = torch.randn(2, 70, 3 * 2 * 16, dtype=torch.float64)
    q, k, v = (x.unflatten(-1, (2, 16)) for x in packed.chunk(3, dim=-1))
    decay = torch.rand(2, 2, 70, dtype=torch.float64).transpose(1, 2)
    assert not any(x.is_contiguous() for x in (q, k, v, decay))
    check([q / 4, k / 4, v, decay, torch.rand(2, dtype=torch.float64) + 0.1])


def test_a_forward_pass_without_gradients_saves_nothing():
    values = [x.float() for x in inputs(70)]
    operands = (*values, *[None] * 10, 0, [], 0.0)
    assert kernels._memory(*operands, False)[3].numel() == 0
    assert kernels._memory(*operands, True)[3].shape == (4, 2, 16, 8)


def test_two_runs_are_the_same_bits():
    values, rule = [single(x).requires_grad_() for x in inputs(150)], single_rule(consolidation("both"))
    (*first, one), (*second, two) = (run(values, None, rule, None, backend="triton") for _ in range(2))
    for a, b in zip([*first[0], *one], [*second[0], *two], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["none", "strength", "both"])
def test_the_operators_keep_the_rules_of_torch_library(kind, packed):
    given = inputs(70, batch=1 if packed else 2)
    values, rule = [single(x.requires_grad_()) for x in given], single_rule(consolidation(kind))
    start = [single(x.requires_grad_()) for x in state()]
    parameters, constants = parts_of(rule)
    where = [None] * 4
    if packed:  # every row that is saved has its chunk
        offsets = torch.tensor([0, 5, 70])
        where = [None, offsets, *segments.layout_on_device(offsets, None, 70, constants.interval)]
    operands = (*values, *start, *parameters, *where, *constants, True)
    torch.library.opcheck(torch.ops.resolvent.memory.default, operands)
    found = [x.detach() for x in torch.ops.resolvent.memory.default(*operands)]
    plain = [x if x is None else x.detach() for x in (*values, *parameters)]
    upstream = torch.randn_like(values[2]), *(torch.randn_like(x) for x in start)
    operands = (*upstream, *plain, *found[3:], *where, *constants)
    torch.library.opcheck(torch.ops.resolvent.memory_backward.default, operands)


def test_unsupported_dtypes_and_widths_are_named():
    values = inputs(10)
    with pytest.raises(ConfigError, match=r"computes in float32, the tensors are torch\.float64"):
        dissipative_memory(*values, backend="triton")
    phases = torch.zeros(2, 10, 8, dtype=torch.float64)
    with pytest.raises(ConfigError, match="does not consolidate a memory that is rotated"):
        dissipative_memory(
            *(x.float() for x in values), phases=phases, consolidation=consolidation("both"), backend="triton"
        )
    with pytest.raises(ConfigError, match="up to a width of 128, got 160"):
        dissipative_memory(*(x.float() for x in inputs(10, key=160)), backend="triton")


def test_launches_are_counted():
    before = dispatch.calls["dissipative_memory", "triton"]
    dissipative_memory(*(x.float() for x in inputs(3)), backend="triton")
    assert dispatch.calls["dissipative_memory", "triton"] == before + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_a_walk_of_one_token(kind):
    values, start, rule = inputs(1), state(), consolidation(kind)
    position = torch.tensor([63, 5])
    with torch.no_grad():
        expected, expected_final = dissipative_memory(
            *values, initial_state=start, position=position, consolidation=rule
        )
        narrow_start = MemoryState(*(single(x) for x in start))
        found, final = dissipative_memory(
            *(single(x) for x in values),
            initial_state=narrow_start,
            position=position,
            consolidation=single_rule(rule),
            backend="triton",
        )
    for a, b in zip((found, *final), (expected, *expected_final), strict=True):
        assert relative(a.double(), b) <= 1e-6


RAGGED = ([5, 0, 64, 130, 0, 1], [3, 0, 100, 64, 127, 0])
"""Tokens of packed sequences, and tokens that each has read before."""


@pytest.mark.parametrize("interval", [0, 64, 128])
@pytest.mark.parametrize("read", [True, False])
def test_a_layout_that_python_does_not_read_is_the_same(interval, read):
    lengths, position = (torch.tensor(x) for x in RAGGED)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    phases = tuple((position % interval).tolist()) if read and interval else (0,) * len(lengths)
    expected = segments._layout(tuple(lengths.tolist()), phases, 0, interval, torch.device("cpu"))
    given = position if read and interval else None
    rows, chunks = segments.layout_on_device(offsets, given, int(offsets[-1]), interval)
    assert torch.equal(rows, expected.segments)
    assert torch.equal(chunks[: len(expected.chunks)], expected.chunks)
    assert not expected.segmented
    for segment, chunk in chunks[len(expected.chunks) :]:
        assert rows[segment, 2] + 64 * chunk >= rows[segment, 1]


@pytest.mark.parametrize("kind", ["none", "both"])
def test_offsets_that_python_does_not_read(kind, monkeypatch):
    monkeypatch.setattr(segments, "_stays_on_device", lambda cu_seqlens: True)
    monkeypatch.setattr(segments, "lengths_and_elapsed", None)  # would read them
    lengths, position = (torch.tensor(x) for x in RAGGED)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    check(inputs(int(offsets[-1]), batch=1), state(len(lengths)), consolidation(kind), position, offsets)
