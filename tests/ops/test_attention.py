import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from resolvent.errors import ConfigError
from resolvent.ops import (
    ReusedWindow,
    WindowState,
    attention,
    local_attention,
    local_attention_reference,
    local_attention_step,
)
from resolvent.ops.attention_window import GROWTH, empty_window, join_windows
from resolvent.ops.dispatch import calls

from .errors import relative

WINDOWS = [1, 2, 7, 16, 200, None]


def inputs(length, batch=2, heads=4, groups=2, key=8, value=6, dtype=torch.float64):
    """q, k, v and the temperature."""
    q = F.normalize(torch.randn(batch, length, heads, key, dtype=dtype), dim=-1)
    k = F.normalize(torch.randn(batch, length, groups, key, dtype=dtype), dim=-1)
    v = torch.randn(batch, length, groups, value, dtype=dtype)
    return [q, k, v, torch.rand(heads, dtype=dtype) + 5]


def window_state(capacity, batch=2, groups=2, key=8, value=6, dtype=torch.float64):
    keys = F.normalize(torch.randn(batch, capacity, groups, key, dtype=dtype), dim=-1)
    return WindowState(keys, torch.randn(batch, capacity, groups, value, dtype=dtype))


def weighted(readout, final):
    """A loss with another weight for every number."""
    total = readout.new_zeros(())
    for x in (readout, *final):
        total = total + (x * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)).sum()
    return total


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 300])
def test_bands_are_the_reference_gradients_included(length, window):
    values = [x.requires_grad_() for x in inputs(length)]
    start = window_state(window or GROWTH)
    for x in start:
        x.requires_grad_()
    sources, position = [*values, *start], 37
    found, state = local_attention(*values, window, initial_state=start, position=torch.full((2,), position))
    grown = start if window else WindowState(*(F.pad(x, (0, 0, 0, 0, 0, len(state.keys[0]) - GROWTH)) for x in start))
    expected, expected_state = local_attention_reference(*values, window, grown, position)
    assert relative(found, expected) <= 1e-12
    assert all(relative(a, b) <= 1e-12 for a, b in zip(state, expected_state, strict=True))
    gradients = torch.autograd.grad(weighted(found, state), sources, materialize_grads=True)
    exact = torch.autograd.grad(weighted(expected, expected_state), sources, materialize_grads=True)
    for a, b in zip(gradients, exact, strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 16, 300])
def test_a_fresh_start_is_the_reference(length, window):
    values = [x.requires_grad_() for x in inputs(length)]
    found, state = local_attention(*values, window)
    expected, _ = local_attention_reference(*values, window)
    assert relative(found, expected) <= 1e-12
    assert state.keys.shape[1] == (window or -(-length // GROWTH) * GROWTH)
    gradients = torch.autograd.grad(found.sin().sum(), values)
    for a, b in zip(gradients, torch.autograd.grad(expected.sin().sum(), values), strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize("window", [5, 40, None])
@pytest.mark.parametrize("splits", [[1] * 60, [40, 20], [13, 1, 30, 16]])
def test_any_split_with_the_window_passed_on_is_the_whole(splits, window):
    *values, temperature = inputs(60)
    whole, last = local_attention(*values, temperature, window)
    pieces, state, position = [], None, torch.zeros(2, dtype=torch.long)
    for piece in zip(*(x.split(splits, 1) for x in values), strict=True):
        readout, state = local_attention(*piece, temperature, window, initial_state=state, position=position)
        position = position + piece[0].shape[1]
        pieces.append(readout)
    assert relative(torch.cat(pieces, 1), whole) <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip(state, last, strict=True))


@pytest.mark.parametrize("window", [5, 40, None])
@pytest.mark.parametrize("fresh", [True, False])
def test_packed_is_separate_gradients_included(window, fresh):
    lengths = [0, 5, 64, 1, 0, 130, 0]
    *values, temperature = (x.requires_grad_() for x in inputs(sum(lengths), batch=1))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    start = None if fresh else window_state(window or GROWTH, batch=len(lengths))
    position = torch.zeros(len(lengths), dtype=torch.long) if fresh else torch.tensor([3, 0, 41, 2, 100, 90, 7])
    packed, state = local_attention(
        *values, temperature, window, initial_state=start, position=position, cu_seqlens=offsets
    )
    pieces, states = [], []
    for i, length in enumerate(lengths):
        span = slice(offsets[i], offsets[i] + length)
        own = empty_window(1, state.keys.shape[1], *values[1:]) if fresh else WindowState(*(x[[i]] for x in start))
        piece, after = local_attention(
            *(x[:, span] for x in values),
            temperature,
            window,
            initial_state=own,
            position=position[[i]],
        )
        pieces.append(piece)
        states.append(after)
    assert relative(packed, torch.cat(pieces, 1)) <= 1e-12
    for name in WindowState._fields:
        assert torch.equal(getattr(state, name), join_windows([getattr(x, name) for x in states]))
    sources = [*values, temperature]
    found = torch.autograd.grad(packed.sin().sum(), sources)
    expected = torch.autograd.grad(torch.cat(pieces, 1).sin().sum(), sources)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize("window", [8, None])
def test_rows_at_different_positions_are_separate(window):
    *values, temperature = inputs(20, batch=3)
    start, position = window_state(window or GROWTH, batch=3), torch.tensor([0, 3, 29])
    for length in (1, 20):
        piece = [x[:, :length] for x in values]
        found, state = local_attention(*piece, temperature, window, initial_state=start, position=position)
        for i in range(3):
            own = WindowState(*(x[[i]] for x in start))
            expected, after = local_attention_reference(
                *(x[[i]] for x in piece), temperature, window, own, int(position[i])
            )
            assert relative(found[[i]], expected) <= 1e-12
            assert torch.equal(state.keys[[i]], after.keys)


def test_gradients_match_finite_differences():
    values = [x.requires_grad_() for x in inputs(7, batch=1, heads=2, groups=1, key=4, value=4)]
    start = [x.requires_grad_() for x in window_state(3, batch=2, groups=1, key=4, value=4)]
    offsets, position = torch.tensor([0, 2, 7]), torch.tensor([2, 1])

    def run(q, k, v, temperature, *state):
        options = dict(initial_state=WindowState(*state), position=position, cu_seqlens=offsets)
        readout, after = local_attention(q, k, v, temperature, 3, **options)
        return readout, *after

    assert torch.autograd.gradcheck(run, [*values, *start])


def test_a_reused_window_is_overwritten_and_another_is_not():
    q, k, v, temperature = inputs(1)
    start, position = window_state(4), torch.tensor([6, 9])
    kept = WindowState(*(x.clone() for x in start))
    expected, after = local_attention_step(q[:, 0], k[:, 0], v[:, 0], temperature, 4, start, position)
    assert all(torch.equal(a, b) for a, b in zip(start, kept, strict=True))
    reused = ReusedWindow(*start)
    found, same = local_attention_step(q[:, 0], k[:, 0], v[:, 0], temperature, 4, reused, position)
    assert torch.equal(found, expected)
    assert same.keys is start.keys
    assert all(torch.equal(a, b) for a, b in zip(same, after, strict=True))


def test_a_buffer_without_a_window_grows_in_blocks():
    *values, temperature = inputs(GROWTH - 1, batch=1)
    _, state = local_attention(*values, temperature, None)
    assert state.keys.shape[1] == GROWTH
    sizes, position = [], GROWTH - 1
    for _ in range(2):
        q, k, v, _ = inputs(1, batch=1)
        _, state = local_attention(q, k, v, temperature, None, initial_state=state, position=torch.tensor([position]))
        position += 1
        sizes.append(state.keys.shape[1])
    assert sizes == [GROWTH, 2 * GROWTH]
    other = window_state(GROWTH, batch=1)
    assert join_windows([state.keys, other.keys]).shape[:2] == (2, 2 * GROWTH)


def test_no_token_changes_an_earlier_read_out_nor_one_beyond_its_window():
    q, k, v, temperature = inputs(60, batch=1)
    before, _ = local_attention(q, k, v, temperature, 16)
    k[:, 20], v[:, 20] = k[:, 21], v[:, 22]
    changed = (local_attention(q, k, v, temperature, 16)[0] - before).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.nonzero().flatten().tolist() == list(range(20, 36))


@pytest.mark.parametrize("state", [True, False])
def test_bfloat16_is_attended_to_and_kept_as_such(state):
    *values, temperature = inputs(100, value=8, dtype=torch.float32)
    half = [x.bfloat16() for x in values]
    start = window_state(32, value=8, dtype=torch.bfloat16)
    options = dict(initial_state=start, position=torch.tensor([40, 40])) if state else {}
    found, after = local_attention(*half, temperature, 32, **options)
    exact = [x.double() for x in half]
    expected, kept = local_attention_reference(*exact, temperature, 32, *((start, 40) if state else ()))
    assert found.dtype == after.keys.dtype == torch.bfloat16
    assert relative(found.double(), expected) <= 2e-2
    assert torch.equal(after.keys.double(), kept.keys)


def test_no_matrix_of_all_scores_is_made():
    """Read 60,000 tokens: all scores of one head alone would take 14 GB."""
    q, k, v, temperature = inputs(60_000, batch=1, heads=1, groups=1, dtype=torch.float32)
    found, _ = local_attention(q, k, v, temperature, 16)
    part = slice(59_900, 60_000)
    expected, _ = local_attention_reference(*(x[:, part] for x in (q, k, v)), temperature, 16)
    assert relative(found[:, 59_920:], expected[:, 20:]) <= 1e-6


def test_empty_input_keeps_the_window():
    start = window_state(5)
    readout, after = local_attention(*inputs(0), 5, initial_state=start, position=torch.tensor([3, 3]))
    assert readout.shape == (2, 0, 4, 6)
    assert after is start


def test_wrong_calls_are_named_and_right_ones_counted():
    q, k, v, temperature = inputs(4)
    with pytest.raises(ValueError, match="H a multiple of J"):
        local_attention(q[:, :, :3], k, v, temperature[:3], 2)
    with pytest.raises(ValueError, match="window must be >= 1 or None, got 0"):
        local_attention(q, k, v, temperature, 0)
    with pytest.raises(ValueError, match=r"temperature must have shape \(4,\), got \(1,\)"):
        local_attention(q, k, v, temperature[:1], 2)
    with pytest.raises(ValueError, match="initial_state needs position"):
        local_attention(q, k, v, temperature, 2, initial_state=window_state(2))
    with pytest.raises(ValueError, match=r"initial_state.keys must have shape \(2, 2, 2, 8\), got \(2, 3, 2, 8\)"):
        local_attention(q, k, v, temperature, 2, initial_state=window_state(3), position=torch.zeros(2).long())
    with pytest.raises(ConfigError, match="cannot run local_attention: "):
        local_attention(q, k, v, temperature, 2, backend="triton")
    before = calls["local_attention", "torch"]
    local_attention(q, k, v, temperature, 2)
    assert calls["local_attention", "torch"] == before + 1


def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """Compute what ``varlen_attn`` computes, and leave the rest as the kernel does: unwritten."""
    out = torch.full_like(q, torch.nan)[..., : v.shape[-1]]
    for i in range(len(cu_q) - 1):
        rows, columns = slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())
        own_q, own_k, own_v = q[rows], k[columns], v[columns]
        assert len(own_q) <= max_q
        assert len(own_k) <= max_k
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhk,shk->hqs", own_q, own_k.repeat_interleave(group, 1)) * scale
        back = torch.arange(len(own_q))[:, None] + len(own_k) - len(own_q) - torch.arange(len(own_k))
        visible = (back >= -window_size[1]) & ((back <= window_size[0]) | (window_size[0] < 0))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out = out.index_put(
            (torch.arange(len(q))[rows],), torch.einsum("hqs,shv->qhv", weights, own_v.repeat_interleave(group, 1))
        )
    return out


@pytest.mark.parametrize("window", [5, 40, None])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
def test_the_kernel_is_given_the_window_before_each_sequence(monkeypatch, window, packed, fresh):
    """Run the layout of the CUDA path on the CPU, with a stand-in for PyTorch's kernel."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    offsets = torch.tensor([0, 0, 30, 31, 90, 90]) if packed else None
    rows = 5 if packed else 2
    values = [x.requires_grad_() for x in inputs(90, batch=1 if packed else 2)]
    options = dict(cu_seqlens=offsets, position=torch.tensor([7, 0, 45, 3, 50][:rows]))
    start = None if fresh else window_state(window or GROWTH, batch=rows)
    if not fresh:
        options["initial_state"] = WindowState(*(x.requires_grad_() for x in start))
    else:
        del options["position"]
    results = []
    for chosen in ("varlen", "torch"):
        monkeypatch.setattr(attention, "attention_implementation", lambda *_, chosen=chosen: chosen)
        results.append(local_attention(*values, window, **options))
    (found, after), (expected, expected_after) = results
    assert relative(found, expected) <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip(after, expected_after, strict=True))
    sources = [*values, *(start or ())]
    gradients = torch.autograd.grad(found.sin().sum(), sources)
    for a, b in zip(gradients, torch.autograd.grad(expected.sin().sum(), sources), strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize(
    ("length", "planned"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (4097, 4608), (8192, 8192)]
)
def test_plans_are_of_few_lengths(length, planned):
    assert attention._planned_length(length) == planned
    assert attention._planned_length(planned) == planned


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("length", [30, 4100])
def test_whole_sequences_on_cuda_are_padded_to_planned_lengths(length, trained, monkeypatch):
    """Run the code for CUDA on the CPU."""
    lengths, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *x, **y: lengths.append(q.shape[2]) or sdpa(q, *x, **y)
    )
    q, k, v, _ = inputs(length, batch=1, key=2, value=2)
    values = [x.requires_grad_(trained) for x in (q, k, v)]
    found, expected = attention._attend_causally_on_cuda(*values, 0.5), attention._attend_causally(*values, 0.5)
    assert lengths == [length if length == 30 and not trained else attention._planned_length(length), length]
    torch.testing.assert_close(found, expected)
    if trained:
        gradients = [torch.autograd.grad(x.sin().sum(), values) for x in (found, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fresh", [True, False])
def test_offsets_that_python_does_not_read_change_nothing(fresh, monkeypatch):
    """Attend to all tokens of packed sequences by the masks that serve offsets on a device."""
    values, offsets = [x.requires_grad_() for x in inputs(300, batch=1)], torch.tensor([0, 20, 20, 290, 300])
    options = dict(cu_seqlens=offsets, return_state=False)
    if not fresh:
        options |= dict(initial_state=window_state(GROWTH, batch=4), position=torch.tensor([3, 50, 0, 256]))
    expected, nothing = local_attention(*values, None, **options)
    assert nothing is None

    def by_masks(q, k, v, state, layout, cu_seqlens):
        return attention._attend_packed(q, k, v, state, layout)

    monkeypatch.setattr(attention, "_attend_all", by_masks)
    found, _ = local_attention(*values, None, **options)
    assert relative(found, expected) <= 1e-12
    gradients = torch.autograd.grad(found.sin().sum(), values)
    for a, b in zip(gradients, torch.autograd.grad(expected.sin().sum(), values), strict=True):
        assert relative(a, b) <= 1e-10


def test_no_number_of_whole_sequences_is_read():
    """Fake tensors hold no numbers: a look at one of them would raise."""
    with FakeTensorMode():
        values = [torch.empty(x.shape) for x in inputs(300, batch=1)]
        for window, slots in ((8, 8), (512, 512), (None, 2 * GROWTH)):
            readout, state = local_attention(*values, window)
            assert readout.shape == (1, 300, 4, 6)
            assert state.keys.shape == (1, slots, 2, 8)


def test_compiles_without_a_break():
    compiled = torch.compile(local_attention, fullgraph=True, backend="aot_eager")
    *values, temperature = inputs(50, batch=1)
    values = [x.requires_grad_() for x in values]
    start, offsets = window_state(8, batch=2), torch.tensor([0, 20, 50])
    options = dict(initial_state=start, position=torch.tensor([3, 20]), cu_seqlens=offsets)
    found, _ = compiled(*values, temperature, 8, **options)
    expected, _ = local_attention(*values, temperature, 8, **options)
    assert relative(found, expected) <= 1e-12
    gradients = torch.autograd.grad(found.sin().sum(), values)
    for a, b in zip(gradients, torch.autograd.grad(expected.sin().sum(), values), strict=True):
        assert relative(a, b) <= 1e-10
