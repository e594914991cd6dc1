import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.ops import gated_prefix_sum, gated_prefix_sum_reference, gated_prefix_sum_step
from resolvent.ops.dispatch import calls
from resolvent.ops.prefix_sum import by_doubling

from .errors import relative


def terms(length, batch=2, rank=5, dtype=torch.float32):
    return torch.rand(batch, length, rank, dtype=dtype), torch.randn(batch, length, rank, dtype=dtype)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
def test_matches_the_reference(length):
    gates, values = terms(length)
    start = torch.randn(2, 5, dtype=torch.float64)
    reference = gated_prefix_sum_reference(gates, values, start)
    sums, state = gated_prefix_sum(gates, values, initial_state=start)
    assert sums.dtype == torch.float32
    assert state.dtype == torch.float64
    assert relative(sums, reference) <= 1e-6
    assert relative(state, reference[:, -1]) <= 1e-6
    assert relative(gated_prefix_sum(gates.double(), values.double(), initial_state=start)[0], reference) <= 1e-12


@pytest.mark.parametrize("splits", [[1] * 65, [64, 1], [1, 64], [30, 30, 5]])
def test_any_split_with_the_state_passed_on_is_the_whole(splits):
    gates, values = terms(65)
    whole, last = gated_prefix_sum(gates, values)
    pieces, state = [], None
    for g, v in zip(gates.split(splits, 1), values.split(splits, 1), strict=True):
        sums, state = gated_prefix_sum(g, v, initial_state=state)
        pieces.append(sums)
    assert relative(torch.cat(pieces, 1), whole) <= 1e-7
    assert relative(state, last) <= 1e-12


def test_the_step_is_the_recurrence():
    gates, values = terms(50)
    state, steps = torch.zeros(2, 5, dtype=torch.float64), []
    for g, v in zip(gates.unbind(1), values.unbind(1), strict=True):
        sums, state = gated_prefix_sum_step(g, v, state)
        steps.append(sums)
    assert relative(torch.stack(steps, 1), gated_prefix_sum(gates, values)[0]) <= 1e-7


def test_packed_is_separate():
    lengths = [0, 5, 64, 1, 0, 130, 0]
    gates, values = terms(sum(lengths), batch=1)
    states, offsets = torch.randn(len(lengths), 5).double(), torch.tensor([0, *lengths]).cumsum(0)
    packed, final = gated_prefix_sum(gates, values, initial_state=states, cu_seqlens=offsets)
    for i, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(final[i], states[i])
            continue
        span = slice(offsets[i], offsets[i + 1])
        alone, last = gated_prefix_sum(gates[:, span], values[:, span], initial_state=states[i : i + 1])
        assert relative(packed[:, span], alone) <= 1e-6
        assert relative(final[i], last[0]) <= 1e-12


def test_gradients_states_and_packing_included():
    gates, values = (x.requires_grad_() for x in terms(12, batch=1, rank=2, dtype=torch.float64))
    states, offsets = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.tensor([0, 5, 5, 12])
    assert torch.autograd.gradcheck(
        lambda g, v, s: gated_prefix_sum(g, v, initial_state=s, cu_seqlens=offsets), (gates, values, states)
    )
    assert torch.autograd.gradcheck(
        lambda g, v, s: gated_prefix_sum(g, v, initial_state=s), (gates, values, states[:1].detach().requires_grad_())
    )


def test_long_sums_keep_every_term():
    """After 2^24 ones a float32 sum stands still."""
    far = torch.full((1, 1), 2.0**24, dtype=torch.float64)
    one = torch.ones(1, 1000, 1)
    _, state = gated_prefix_sum(one, one, initial_state=far)
    assert state.item() == 2**24 + 1000
    gates, values = terms(100_000, batch=1, rank=2)
    assert relative(gated_prefix_sum(gates, values.abs())[0], (gates * values.abs()).double().cumsum(1)) <= 1e-7


def test_no_term_changes_an_earlier_sum():
    gates, values = terms(20)
    before = gated_prefix_sum(gates, values)[0]
    changed = values.clone()
    changed[:, 11] += 1
    after = gated_prefix_sum(gates, changed)[0]
    assert torch.equal(after[:, :11], before[:, :11])
    assert (after[:, 11:] != before[:, 11:]).all()


def test_half_precision_is_widened_before_it_is_summed():
    gates, values = (x.to(torch.bfloat16) for x in terms(3000, batch=1))
    sums, _ = gated_prefix_sum(gates, values)
    assert sums.dtype == torch.float32
    assert relative(sums, gated_prefix_sum_reference(gates, values)) <= 1e-6


def test_empty_input_keeps_the_state():
    state = torch.randn(2, 5, dtype=torch.float64)
    sums, after = gated_prefix_sum(*terms(0), initial_state=state)
    assert sums.shape == (2, 0, 5)
    assert torch.equal(after, state)


def test_wrong_calls_are_named_and_right_ones_counted(monkeypatch):
    gates, values = terms(4)
    with pytest.raises(ValueError, match="expected gates and values"):
        gated_prefix_sum(gates, values[..., :2])
    with pytest.raises(ValueError, match="batch of one"):
        gated_prefix_sum(gates, values, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"initial_state must have shape \(2, 5\), got \(2, 4\)"):
        gated_prefix_sum(gates, values, initial_state=torch.zeros(2, 4))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="cannot run gated_prefix_sum: the tensors are on cpu"):
        gated_prefix_sum(gates, values, backend="triton")
    before = calls["gated_prefix_sum", "torch"]
    gated_prefix_sum(gates, values)
    assert calls["gated_prefix_sum", "torch"] == before + 1


@pytest.mark.parametrize("length", [1, 2, 3, 64, 100])
def test_running_sums_by_doubling(length):
    x = torch.randn(3, length, dtype=torch.float64)
    torch.testing.assert_close(by_doubling(x), x.cumsum(-1), rtol=1e-12, atol=1e-12)
