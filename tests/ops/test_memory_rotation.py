import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from resolvent.ops import (
    Consolidation,
    MemoryState,
    Resonance,
    SNRFilter,
    consolidate,
    dissipative_memory,
    dissipative_memory_reference,
    dissipative_memory_step,
)
from resolvent.ops.consolidation import consolidate_gradient
from resolvent.ops.hebbian import CHUNK
from resolvent.ops.memory_rotation import (
    accumulate_phases,
    angles_of,
    plateau_turns,
    rotate_memory,
    rotate_queries_keys,
    stair_turns,
    turns_by_order,
)

from .errors import relative
from .test_hebbian import KINDS, consolidation, inputs, state, tensors_of

KEY = 16


def turns_of(length, batch=2, dtype=torch.float64):
    """Up to half a turn per token, as ``plateau_turns`` gives it."""
    return torch.rand(batch, length, KEY // 2, dtype=dtype) - 0.5


def start_of(batch=2):
    return torch.rand(batch, KEY // 2, dtype=torch.float64)


def apart(a, b):
    """Return the largest distance of phases on the circle."""
    return (a - b - (a - b).round()).abs().max().item()


def test_turns_have_plateaus_at_none_and_half():
    p = torch.linspace(-2, 2, 4001, dtype=torch.float64).requires_grad_()
    turns = plateau_turns(p)
    (slope,) = torch.autograd.grad(turns.sum(), p)
    size, none, half = p.detach().abs(), p.detach().abs() < 0.2499, p.detach().abs() > 0.7501
    assert bool((turns[none] == 0).all()) and bool((turns[half].abs() == 0.5).all())
    between = ~none & ~half & (size > 0.2501) & (size < 0.7499)
    assert torch.equal(slope[between], torch.ones_like(slope[between]))
    assert not slope[none | half].any() and torch.equal(turns[between].sign(), p[between].sign())


@pytest.mark.parametrize("order", [3, 5])
def test_stairs_are_exact_around_every_multiple_of_a_turn(order):
    level = torch.arange(-7, 8, dtype=torch.float32)[:, None]
    near = (level + torch.linspace(-0.29, 0.29, 101)) * 2 / order
    turns = stair_turns(near, order)
    assert turns.dtype == torch.float64
    assert torch.equal(turns, (level.double() / order).expand_as(turns))


def test_stairs_rise_without_jumps_between_plateaus():
    u = torch.linspace(-2.5, 2.5, 100_001, dtype=torch.float64).requires_grad_()
    levels = stair_turns(u * 2 / 3, 3) * 3
    (slope,) = torch.autograd.grad(levels.sum(), u)
    between = (u.detach() - u.detach().round()).abs() > 0.31
    assert bool((slope[between] > 0.01).all()) and slope.min() >= 0 and slope.max() < 4.2
    assert levels.detach().diff().abs().max() < 4.2 * 5e-5 + 1e-12
    assert torch.allclose(levels, -levels.flip(0), atol=1e-12)


def test_the_gradient_of_stairs_is_exact():
    u = torch.linspace(-1.9, 1.9, 60, dtype=torch.float64)
    u = u[((u - u.round()).abs() - 0.3).abs() > 0.01].requires_grad_()  # away from the ends of plateaus
    assert torch.autograd.gradcheck(lambda x: turns_by_order(x, (2, 3)), u[: len(u) // 2 * 2])


def test_groups_of_pairs_have_their_own_orders():
    projected = torch.randn(2, 7, 8)
    turns = turns_by_order(projected, (2, 3, 2, 5))
    for group, order in enumerate((2, 3, 2, 5)):
        part = projected[..., 2 * group : 2 * group + 2]
        expected = plateau_turns(part).double() if order == 2 else stair_turns(part, order)
        assert torch.equal(turns[..., 2 * group : 2 * group + 2], expected)
    assert torch.equal(turns_by_order(projected, (2,)), plateau_turns(projected))


def test_thirds_leave_no_error_in_a_million():
    """An error of 0.1 of the projection leaves the phase of a third per token where it is."""
    projected = 2 / 3 + 0.1 * (torch.rand(1, 1_000_000, 1, generator=torch.Generator().manual_seed(0)) - 0.5)
    _, last = accumulate_phases(stair_turns(projected, 3), torch.zeros(1, 1, dtype=torch.float64))
    assert apart(last, torch.full((1, 1), 1_000_000 / 3, dtype=torch.float64) % 1) < 1e-9


def test_a_token_on_a_plateau_leaves_no_error_in_a_million():
    """An error of 0.1 of the projection, which ``π tanh`` would turn into thousands of turns."""
    projected = 0.9 + 0.1 * torch.rand(1, 1_000_000, 1, generator=torch.Generator().manual_seed(0))
    _, last = accumulate_phases(plateau_turns(projected), torch.zeros(1, 1, dtype=torch.float64))
    assert last.item() == 0.0


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_phases_are_running_sums(length):
    turns, start = turns_of(length), start_of()
    phases, last = accumulate_phases(turns, start)
    assert apart(phases, turns.cumsum(1) + start.unsqueeze(1)) < 1e-12
    assert torch.equal(last, phases[:, -1])
    assert ((phases >= 0) & (phases <= 1)).all()


def test_phases_of_any_split_equal_one_call():
    turns, start = turns_of(300), start_of()
    whole, last = accumulate_phases(turns, start)
    pieces = []
    for piece in turns.split([1, 63, 100, 136], dim=1):
        phases, start = accumulate_phases(piece, start)
        pieces.append(phases)
    assert apart(torch.cat(pieces, 1), whole) < 1e-12
    assert apart(start, last) < 1e-12


def test_packed_phases_equal_separate():
    lengths = [0, 5, 64, 1, 200, 0]
    turns, start = turns_of(sum(lengths), batch=1), start_of(len(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    phases, last = accumulate_phases(turns, start, offsets)
    for i, length in enumerate(lengths):
        span = slice(offsets[i], offsets[i + 1])
        expected, of_end = accumulate_phases(turns[:, span], start[i : i + 1])
        assert apart(last[i : i + 1], of_end) < 1e-12
        assert not length or apart(phases[:, span], expected) < 1e-12


def test_gradients_of_phases_pass_gradcheck():
    turns, start = turns_of(70, batch=1).requires_grad_(), start_of(2).requires_grad_()
    offsets = torch.tensor([0, 3, 70])
    assert torch.autograd.gradcheck(lambda *x: accumulate_phases(*x, offsets), (turns, start), fast_mode=True)


@pytest.mark.slow
def test_ten_million_tokens_one_by_one_equal_chunks_to_a_millionth_of_a_turn():
    turns = (torch.rand(10_000_000, generator=torch.Generator().manual_seed(0)) - 0.5).view(1, -1, 1)
    chunked = torch.zeros(1, 1, dtype=torch.float64)
    for piece in turns.split(4096, dim=1):
        _, chunked = accumulate_phases(piece, chunked)
    _, whole = accumulate_phases(turns, torch.zeros(1, 1, dtype=torch.float64))
    one_by_one, exact = 0.0, 0
    for turn in turns.flatten().tolist():  # what ``accumulate_phases`` does with a single token
        one_by_one += turn
        one_by_one -= math.floor(one_by_one)
    exact = math.fsum(turns.flatten().tolist())
    for found in (chunked, whole, torch.tensor([[one_by_one]])):
        assert apart(found, torch.tensor(exact, dtype=torch.float64)) < 1e-6


def test_a_single_token_is_one_addition_and_one_reduction():
    """The emulation above is what the operator does."""
    phase, found = 0.0, torch.zeros(1, 1, dtype=torch.float64)
    for turn in turns_of(300)[0, :, 0].tolist():
        phase += turn
        phase -= math.floor(phase)
        _, found = accumulate_phases(torch.full((1, 1, 1), turn, dtype=torch.float64), found)
        assert found.item() == phase


def test_rotation_keeps_lengths_and_turns_by_the_difference_of_phases():
    q, k = F.normalize(torch.randn(2, 1, 9, 2, KEY, dtype=torch.float64), dim=-1)
    phases, _ = accumulate_phases(turns_of(9, batch=1), start_of(1))
    a, b = rotate_queries_keys(q, k, phases)
    torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1))
    difference = phases[:, [3]] - phases[:, [7]]
    expected = (rotate_queries_keys(q[:, [3]], k[:, [3]], difference)[0] * k[:, [7]]).sum(-1)
    torch.testing.assert_close((a[:, [3]] * b[:, [7]]).sum(-1), expected)


def test_gradients_of_the_rotation_pass_gradcheck():
    q, k, _, _, _ = inputs(5, key=KEY)
    phases, _ = accumulate_phases(turns_of(5), start_of())
    given = [x.requires_grad_() for x in (q, k, phases)]
    assert torch.autograd.gradcheck(rotate_queries_keys, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK + 1, 200])
def test_a_rotating_memory_equals_the_reference_gradients_included(length, kind):
    values, start = [x.requires_grad_() for x in inputs(length, key=KEY)], [x.requires_grad_() for x in state(key=KEY)]
    turns, rule, position = turns_of(length).requires_grad_(), consolidation(kind), 37
    sources = [*values, turns, *start, *tensors_of(rule)]

    def outcome(run):
        phases, _ = accumulate_phases(turns, torch.zeros(2, KEY // 2, dtype=torch.float64))
        readout, final = run(phases)
        weights = torch.cos(torch.arange(readout.numel(), dtype=readout.dtype)).view_as(readout)
        loss = (readout * weights).sum() + sum((x * torch.cos(x)).sum() for x in final)
        return [readout, *final], torch.autograd.grad(loss, sources, materialize_grads=True)

    found, gradients = outcome(
        lambda phases: dissipative_memory(
            *values, initial_state=MemoryState(*start), position=torch.full((2,), position), consolidation=rule,
            phases=phases,
        )
    )  # fmt: skip
    expected, expected_gradients = outcome(
        lambda phases: dissipative_memory_reference(*values, MemoryState(*start), position, rule, phases)
    )
    for a, b in zip([*found, *gradients], [*expected, *expected_gradients], strict=True):
        assert relative(a, b) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_added_to_all_phases_changes_no_read_out(kind):
    values, rule = inputs(200, key=KEY), consolidation(kind)
    phases, _ = accumulate_phases(turns_of(200), start_of())
    position = torch.tensor([0, 37])
    found, final = dissipative_memory(*values, position=position, consolidation=rule, phases=phases)
    constant = torch.rand(KEY // 2, dtype=torch.float64)
    turned, of_turned = dissipative_memory(*values, position=position, consolidation=rule, phases=phases + constant)
    torch.testing.assert_close(turned, found, rtol=1e-10, atol=1e-12)
    angles = angles_of(constant.expand(2, -1), torch.float64)
    torch.testing.assert_close(of_turned.memory, rotate_memory(final.memory, angles), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_of_a_rotating_memory_equals_one_call(kind):
    values, rule = inputs(150, key=KEY), consolidation(kind)
    phases, _ = accumulate_phases(turns_of(150), start_of())
    whole, last = dissipative_memory(*values, consolidation=rule, phases=phases)
    pieces, carried, position = [], None, torch.zeros(2, dtype=torch.long)
    for *piece, of_piece in zip(*(x.split([63, 1, 64, 22], dim=1) for x in (*values[:4], phases)), strict=True):
        readout, carried = dissipative_memory(
            *piece, values[4], initial_state=carried, position=position, consolidation=rule, phases=of_piece
        )
        position = position + piece[0].shape[1]
        pieces.append(readout)
    assert relative(torch.cat(pieces, 1), whole) <= 1e-10
    assert relative(carried.memory, last.memory) <= 1e-10


def test_packed_rotating_memories_equal_separate():
    lengths = [5, 64, 200, 1]
    values, rule = inputs(sum(lengths), batch=1, key=KEY), consolidation("both")
    offsets, start = torch.tensor([0, *lengths]).cumsum(0), start_of(4)
    phases, _ = accumulate_phases(turns_of(sum(lengths), batch=1), start, offsets)
    found, final = dissipative_memory(*values, cu_seqlens=offsets, consolidation=rule, phases=phases)
    for i in range(4):
        span = slice(offsets[i], offsets[i + 1])
        row = [x[:, span] for x in values[:4]]
        expected, last = dissipative_memory_reference(*row, values[4], consolidation=rule, phases=phases[:, span])
        assert relative(found[:, span], expected) <= 1e-10
        assert relative(final.memory[i : i + 1], last.memory) <= 1e-10


def test_a_step_of_a_rotating_memory_equals_the_reference():
    values, rule, start, position = inputs(1, key=KEY), consolidation("both"), state(key=KEY), torch.tensor([63, 63])
    phases = torch.rand(2, 1, KEY // 2, dtype=torch.float64)
    step = (*(x[:, 0] for x in values[:4]), values[4])
    found, final = dissipative_memory_step(*step, start, position, rule, phases[:, 0])
    expected, last = dissipative_memory_reference(*values, start, 63, rule, phases)
    assert relative(found, expected[:, 0]) <= 1e-10
    assert relative(final.memory, last.memory) <= 1e-10


@pytest.mark.parametrize("which", ["snr", "resonance", "both"])
def test_the_written_out_gradient_of_a_rotating_consolidation_equals_autograd(which):
    memory, grad = torch.randn(2, 2, 2, 8, 4, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    strength, sharpness, bias = (torch.rand(2, dtype=torch.float64) for _ in range(3))
    snr = SNRFilter(1.0, 0.5, 3.0, 1.5, strength) if which != "resonance" else None
    resonance = Resonance(basis, 0.1, 3 * sharpness, bias) if which != "snr" else None
    rule, phases = Consolidation(64, snr, resonance), torch.rand(2, 4, dtype=torch.float64)
    forgetting = torch.rand(2, 2, dtype=torch.float64)
    sources = [memory, forgetting, phases, *rule.parameters]
    for source in sources:
        source.requires_grad_()
    out = consolidate(memory, forgetting, rule, phases)
    expected = torch.autograd.grad(out, sources, grad, materialize_grads=True)
    with torch.no_grad():
        found = consolidate_gradient(grad, memory, forgetting, rule, phases)
    for a, b in zip((*found[:3], *found.parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_empty_rotating_memory_stays_empty_with_finite_gradients():
    rule = consolidation("both", key=8)
    memory, phases = torch.zeros(1, 2, 8, 4, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64)
    found = consolidate_gradient(torch.ones_like(memory), memory, torch.ones(1, 2), rule, phases)
    assert torch.equal(consolidate(memory, torch.ones(1, 2), rule, phases), memory)
    assert all(x.isfinite().all() for x in (found.memory, found.forgetting, found.phases, *found.parameters))


def test_without_phases_the_filters_judge_single_components():
    memory, rule = torch.randn(1, 2, 8, 4, dtype=torch.float64), consolidation("strength", key=8)
    rule = replace(rule, snr=replace(rule.snr, strength=None))
    forgetting, phases = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    single, paired = consolidate(memory, forgetting, rule), consolidate(memory, forgetting, rule, phases)
    factors = (paired / memory).chunk(2, dim=-2)
    torch.testing.assert_close(factors[0], factors[1])
    assert not torch.allclose(single, paired)
