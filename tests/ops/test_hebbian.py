from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from resolvent.ops import (
    Consolidation,
    MemoryState,
    Resonance,
    SNRFilter,
    dissipative_memory,
    dissipative_memory_reference,
    dissipative_memory_step,
)
from resolvent.ops.hebbian import CHUNK

from .errors import relative

LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 300)
DECAYS = {"weak": 1e-3, "middling": 0.3, "strong": 1000.0}


def inputs(length, strength=0.3, batch=2, heads=2, key=16, value=8, dtype=torch.float64):
    """q, k of unit length, v, decay and eta."""
    q, k = (F.normalize(torch.randn(batch, length, heads, key, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(batch, length, heads, value, dtype=dtype)
    return [q, k, v, strength * torch.rand(batch, length, heads, dtype=dtype), torch.rand(heads, dtype=dtype) + 0.1]


def state(batch=2, heads=2, key=16, value=8, dtype=torch.float64):
    memory = torch.randn(batch, heads, key, value, dtype=dtype)
    return MemoryState(memory, torch.rand(batch, heads, dtype=dtype))


KINDS = ["none", "snr", "strength", "resonance", "both"]
"""Nothing, the SNR filter at full strength and at a strength of its own, the resonance, and the last two."""


def consolidation(kind, heads=2, key=16, interval=CHUNK, dtype=torch.float64):
    if kind == "none":
        return None
    basis = torch.linalg.qr(torch.randn(key, key, dtype=dtype))[0]
    strength, sharpness, bias = (torch.rand(heads, dtype=dtype).requires_grad_() for _ in range(3))
    return Consolidation(
        interval,
        SNRFilter(1.0, 0.5, 2.0, 1.5, None if kind == "snr" else strength) if kind != "resonance" else None,
        Resonance(basis, 0.5, sharpness, bias) if kind in ("resonance", "both") else None,
    )


def tensors_of(consolidation):
    return consolidation.parameters if consolidation else ()


@pytest.mark.parametrize("strength", DECAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_are_the_reference_gradients_included(length, kind, strength):
    values = [x.requires_grad_() for x in inputs(length, DECAYS[strength])]
    start = MemoryState(*(x.requires_grad_() for x in state()))
    rule = consolidation(kind)
    sources = [*values, *start, *tensors_of(rule)]

    def loss_gradients(readout, final):
        weights = torch.cos(torch.arange(readout.numel(), dtype=readout.dtype)).view_as(readout)
        loss = (readout * weights).sum() + sum(x.square().sum() for x in final)
        return torch.autograd.grad(loss, sources, materialize_grads=True)

    position = 37
    readout, final = dissipative_memory(
        *values, initial_state=start, position=torch.full((2,), position), consolidation=rule
    )
    expected, expected_final = dissipative_memory_reference(*values, start, position, rule)
    assert relative(readout, expected) <= 1e-10
    assert all(relative(a, b) <= 1e-10 for a, b in zip(final, expected_final, strict=True))
    found = loss_gradients(readout, final)
    for a, b in zip(found, loss_gradients(expected, expected_final), strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize("interval", [CHUNK, 2 * CHUNK])
def test_longer_intervals(interval):
    values, rule = inputs(400), consolidation("both", interval=interval)
    found, final = dissipative_memory(*values, consolidation=rule)
    expected, expected_final = dissipative_memory_reference(*values, consolidation=rule)
    assert relative(found, expected) <= 1e-10
    assert relative(final.memory, expected_final.memory) <= 1e-10


@pytest.mark.parametrize("strength", DECAYS)
def test_single_precision(strength):
    values, rule = inputs(300, DECAYS[strength]), consolidation("both")
    expected, _ = dissipative_memory_reference(*values, consolidation=rule)
    single = [x.float() for x in values]
    found, final = dissipative_memory(*single, consolidation=rule)
    assert found.dtype == torch.float32
    assert relative(found, expected) <= 1e-5
    assert final.memory.dtype == torch.float32


def test_bfloat16_inputs_keep_a_float32_state():
    values = inputs(300)
    half = [x.bfloat16() for x in values[:3]] + [x.float() for x in values[3:]]
    exact = [x.double() for x in half]
    found, final = dissipative_memory(*half)
    assert found.dtype == torch.bfloat16
    assert relative(found.double(), dissipative_memory_reference(*exact)[0]) <= 5e-3
    assert final.memory.dtype == torch.float32


@pytest.mark.parametrize("splits", [[1] * 150, [100, 50], [63, 1, 64, 22], [7] * 21 + [3]])
def test_any_split_with_the_state_passed_on_is_the_whole(splits):
    values, rule = inputs(150), consolidation("both")
    whole, last = dissipative_memory(*values, consolidation=rule)
    pieces, carried, position = [], None, torch.zeros(2, dtype=torch.long)
    for piece in zip(*(x.split(splits, dim=1) for x in values[:4]), strict=True):
        readout, carried = dissipative_memory(
            *piece, values[4], initial_state=carried, position=position, consolidation=rule
        )
        position = position + piece[0].shape[1]
        pieces.append(readout)
    assert relative(torch.cat(pieces, 1), whole) <= 1e-10
    assert all(relative(a, b) <= 1e-10 for a, b in zip(carried, last, strict=True))


def test_rows_of_a_batch_may_have_different_positions():
    values, start, rule = inputs(100, batch=3), state(batch=3), consolidation("both")
    positions = torch.tensor([0, 63, 130])
    found, final = dissipative_memory(*values, initial_state=start, position=positions, consolidation=rule)
    step, after = dissipative_memory_step(*(x[:, 0] for x in values[:4]), values[4], start, positions, rule)
    assert relative(step, found[:, 0]) <= 1e-10
    for i in range(3):
        row = [x[i : i + 1] for x in values[:4]]
        alone = MemoryState(*(x[i : i + 1] for x in start))
        expected, last = dissipative_memory_reference(*row, values[4], alone, int(positions[i]), rule)
        assert relative(found[i : i + 1], expected) <= 1e-10
        assert relative(final.memory[i : i + 1], last.memory) <= 1e-10
    assert torch.equal(after.forgetting[1], torch.zeros(2))


def test_packed_is_separate():
    lengths = [0, 5, 64, 200, 1, 0, 130]
    values, rule = inputs(sum(lengths), batch=1), consolidation("both")
    offsets, count = torch.tensor([0, *lengths]).cumsum(0), len(lengths)
    start, positions = state(batch=count), torch.randint(0, 500, (count,))
    found, final = dissipative_memory(
        *values, initial_state=start, position=positions, cu_seqlens=offsets, consolidation=rule
    )
    for i, length in enumerate(lengths):
        alone = MemoryState(*(x[i : i + 1] for x in start))
        if length == 0:
            assert all(torch.equal(a[i], b[0]) for a, b in zip(final, alone, strict=True))
            continue
        span = slice(offsets[i], offsets[i + 1])
        row = [x[:, span] for x in values[:4]]
        expected, last = dissipative_memory_reference(*row, values[4], alone, int(positions[i]), rule)
        assert relative(found[:, span], expected) <= 1e-10
        assert all(relative(a[i : i + 1], b) <= 1e-10 for a, b in zip(final, last, strict=True))


def test_gradcheck_with_packed_sequences_and_consolidation():
    values = [x.requires_grad_() for x in inputs(70, batch=1, heads=1, key=4, value=3)]
    start = MemoryState(*(x.requires_grad_() for x in state(batch=2, heads=1, key=4, value=3)))
    rule = consolidation("both", heads=1, key=4)

    def run(q, k, v, decay, eta, memory, forgetting, strength, sharpness, bias):
        snr, resonance = replace(rule.snr, strength=strength), replace(rule.resonance, sharpness=sharpness, bias=bias)
        readout, final = dissipative_memory(
            q, k, v, decay, eta,
            initial_state=MemoryState(memory, forgetting),
            cu_seqlens=torch.tensor([0, 3, 70]),
            consolidation=replace(rule, snr=snr, resonance=resonance),
        )  # fmt: skip
        return readout, *final

    assert torch.autograd.gradcheck(run, (*values, *start, *rule.parameters), fast_mode=True)


def at(strength):
    """The SNR filter of ``consolidation`` at a strength."""
    return Consolidation(CHUNK, replace(consolidation("snr").snr, strength=strength))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_strength_the_filter_acts_fully(dtype):
    values, start = inputs(150, dtype=dtype), state(dtype=dtype)
    given, grads = [*values, *start], []
    for rule in (at(None), at(torch.ones(2))):
        sources = [x.clone().requires_grad_() for x in given]
        readout, final = dissipative_memory(
            *sources[:5], initial_state=MemoryState(*sources[5:]), position=torch.tensor([0, 9]), consolidation=rule
        )
        loss = readout.sum() + sum(x.square().sum() for x in final)
        grads.append([readout, *final, *torch.autograd.grad(loss, sources)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_at_a_strength_of_zero_there_is_no_filter():
    values, start = inputs(150), state()
    strength = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found, final = dissipative_memory(*values, initial_state=start, consolidation=at(strength))
    expected, plain = dissipative_memory(*values, initial_state=start)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final.memory, plain.memory, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(found.square().sum(), strength)
    assert (grad != 0).all()  # it can be opened


def test_every_head_has_its_own_strength():
    values = inputs(150)
    found, _ = dissipative_memory(*values, consolidation=at(torch.tensor([0.0, 1.0])))
    without, _ = dissipative_memory(*values)
    fully, _ = dissipative_memory(*values, consolidation=at(None))
    torch.testing.assert_close(found, torch.stack([without[:, :, 0], fully[:, :, 1]], 2), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(without, fully)


def test_unused_parameters_get_zero_gradients():
    values, rule = [x.requires_grad_() for x in inputs(10)], consolidation("both")
    readout, _ = dissipative_memory(*values, consolidation=rule)
    readout.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros(2)) for x in rule.parameters)


def test_training_after_inference_on_the_same_lengths():
    values = inputs(77)
    with torch.inference_mode():
        dissipative_memory(*values)
    values[0].requires_grad_()
    dissipative_memory(*values)[0].sum().backward()
    assert values[0].grad.isfinite().all()


def test_reads_out_what_was_written():
    """One association stored at a key comes back at that key: y = S'q, not S q."""
    k = torch.zeros(1, 2, 1, 16, dtype=torch.float64)
    k[0, 0, 0, 3] = 1
    q, v = k.roll(1, dims=1), torch.randn(1, 2, 1, 16, dtype=torch.float64)
    readout, _ = dissipative_memory(q, k, v, torch.zeros(1, 2, 1), torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(readout[0, 1, 0], 0.5 * v[0, 0, 0], rtol=1e-12, atol=1e-12)


def test_wrong_calls_are_named():
    values = inputs(10)
    with pytest.raises(ValueError, match="expected q, k"):
        dissipative_memory(values[0][:, :5], *values[1:])
    with pytest.raises(ValueError, match="batch of one"):
        dissipative_memory(*values, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="multiple of 64, got 100"):
        dissipative_memory(*values, consolidation=Consolidation(100))
    with pytest.raises(ValueError, match=r"eta must have shape \(2,\), got \(1,\)"):
        dissipative_memory(*values[:4], values[4][:1])
    with pytest.raises(ValueError, match=r"position must have shape \(2,\), got \(1,\)"):
        dissipative_memory(*values, position=torch.zeros(1, dtype=torch.long))
    one, whole = state(batch=1), state()
    for name in MemoryState._fields:
        wrong = whole._replace(**{name: getattr(one, name)})
        with pytest.raises(ValueError, match=rf"initial_state.{name} must have shape \(2, 2"):
            dissipative_memory(*values, initial_state=wrong)
