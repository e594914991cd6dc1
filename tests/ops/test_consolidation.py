import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resolvent.ops import Consolidation, Resonance, SNRFilter, consolidate
from resolvent.ops.consolidation import consolidate_gradient, mode_energies, modes, resonance_gate, signal_to_noise


def filters(heads=2, key=8, sharpness=1.0, bias=0.0, strength=None):
    basis = torch.linalg.qr(torch.randn(key, key, dtype=torch.float64))[0]
    ones = torch.ones(heads, dtype=torch.float64)
    return SNRFilter(2.0, 0.5, 3.0, 1.5, strength), Resonance(basis, 0.1, sharpness * ones, bias * ones)


@pytest.mark.parametrize("strengths", [None, (0.3, 0.8)])
def test_the_snr_filter_is_its_formula(strengths):
    memory = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    forgetting = torch.rand(1, 2, dtype=torch.float64)
    snr, _ = filters(strength=None if strengths is None else torch.tensor(strengths, dtype=torch.float64))
    found = consolidate(memory, forgetting, Consolidation(64, snr))
    for head, strength in enumerate(strengths or (1.0, 1.0)):
        s = memory[0, head]
        p = torch.sigmoid((s.abs() / s.square().mean().sqrt() - 2.0) / 0.5)
        m = strength * ((3.0 - 1) * (1 - p) - (1 - 1 / 1.5) * p)
        expected = s / (1 + m * (1 - torch.exp(-forgetting[0, head])))
        torch.testing.assert_close(found[0, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_noise_and_signal_settle_where_the_boosts_say(strength):
    """A component that settles at W without the filter settles at W / (1 + m) with it."""
    snr, _ = filters(strength=torch.full((2,), strength, dtype=torch.float64))
    kept, unfiltered = 0.8, 3.0
    settled = {}
    for kind, threshold in (("noise", 1e6), ("signal", -1e6)):  # p = 0, p = 1
        rule = Consolidation(64, replace(snr, threshold=threshold))
        memory = torch.zeros(1, 2, 8, 4, dtype=torch.float64)
        forgetting = torch.full((1, 2), -math.log(kept), dtype=torch.float64)
        for _ in range(300):
            memory = consolidate(kept * memory + (1 - kept) * unfiltered, forgetting, rule)
        settled[kind] = memory[0, 0, 0, 0].item()
    assert settled["noise"] == pytest.approx(unfiltered / (1 + strength * 2.0), rel=1e-9)
    assert settled["signal"] == pytest.approx(unfiltered / (1 - strength * (1 - 1 / 1.5)), rel=1e-9)


def test_to_first_order_noise_forgets_faster_and_signal_learns_more():
    """With Γ̄ = Γt small, the filter is a Γ of gamma_boost times the size, or an η of eta_boost times the size."""
    memory, small = torch.randn(1, 2, 8, 4, dtype=torch.float64), 1e-6
    forgetting = torch.full((1, 2), small, dtype=torch.float64)
    snr, _ = filters()
    slopes = {
        threshold: (consolidate(memory, forgetting, Consolidation(64, replace(snr, threshold=threshold))) - memory)
        / (small * memory)
        for threshold in (1e6, -1e6)
    }
    torch.testing.assert_close(slopes[1e6], torch.full_like(memory, -2.0), rtol=1e-5, atol=0)  # 1 - gamma_boost
    torch.testing.assert_close(slopes[-1e6], torch.full_like(memory, 1 / 3), rtol=1e-5, atol=0)  # 1 - 1 / eta_boost


def test_the_resonance_is_its_formula():
    memory = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    _, resonance = filters(sharpness=1.7, bias=-0.3)
    found = consolidate(memory, memory[..., 0, 0], Consolidation(64, None, resonance))
    q = resonance.basis
    for head in range(2):
        spectrum = q.T @ memory[0, head]
        energy = spectrum.square().sum(1)
        gate = torch.sigmoid(1.7 * (energy / energy.mean() - 0.1) - 0.3)
        torch.testing.assert_close(found[0, head], q @ torch.diag(gate) @ spectrum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["snr", "strength", "resonance", "both"])
def test_the_written_out_gradient_is_autograds(which):
    memory, grad = torch.randn(2, 2, 2, 8, 4, dtype=torch.float64)
    forgetting = torch.rand(2, 2, dtype=torch.float64)
    strength = None if which == "snr" else torch.tensor([0.0, 0.7], dtype=torch.float64)
    snr, resonance = filters(sharpness=1.3, bias=0.2, strength=strength)
    of_memory, of_modes = which != "resonance", which in ("resonance", "both")
    rule = Consolidation(64, snr if of_memory else None, resonance if of_modes else None)
    sources = [memory, forgetting, *rule.parameters]
    assert len(sources) == 2 + {"snr": 0, "strength": 1, "resonance": 2, "both": 3}[which]
    for source in sources:
        source.requires_grad_()
    expected = torch.autograd.grad(consolidate(memory, forgetting, rule), sources, grad, materialize_grads=True)
    with torch.no_grad():
        found = consolidate_gradient(grad, memory, forgetting, rule)
    for a, b in zip((*found[:2], *found.parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_written_out_gradient_is_that_of_small_changes():
    memory, grad = torch.randn(2, 2, 2, 8, 4, dtype=torch.float64)
    forgetting = torch.rand(2, 2, dtype=torch.float64)
    snr, resonance = filters(sharpness=1.3, bias=0.2, strength=torch.tensor([0.2, 0.7], dtype=torch.float64))
    rule = Consolidation(64, snr, resonance)
    found = consolidate_gradient(grad, memory, forgetting, rule)
    gradients, places = (*found[:2], *found.parameters), (memory, forgetting, *rule.parameters)

    def loss():
        return (grad * consolidate(memory, forgetting, rule)).sum()

    for gradient, place in zip(gradients, places, strict=True):
        direction, losses = torch.randn_like(place), []
        for step in (1e-6, -2e-6):
            place += step * direction
            losses.append(loss())
        place += 1e-6 * direction
        slope = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_an_empty_memory_stays_empty_with_finite_gradients():
    memory = torch.zeros(1, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    out = consolidate(memory, torch.ones(1, 2), Consolidation(64, *filters()))
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert memory.grad.isfinite().all()


def test_filters_do_not_depend_on_the_memorys_scale():
    memory = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    rule = Consolidation(64, *filters())
    small, large = (consolidate(c * memory, torch.ones(1, 2), rule) / c for c in (1e-4, 1e4))
    torch.testing.assert_close(small, large, rtol=1e-8, atol=1e-10)


def test_statistics_are_relative():
    memory = torch.randn(3, 2, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(
        signal_to_noise(memory).square().mean((-2, -1)), torch.ones(3, 2, dtype=torch.float64), rtol=1e-9, atol=0
    )
    energies = mode_energies(modes(memory, filters()[1].basis))
    torch.testing.assert_close(energies.mean(-1), torch.ones(3, 2, dtype=torch.float64), rtol=1e-9, atol=0)


@given(
    scale=st.floats(1e-8, 1e8),
    sharpness=st.floats(-50, 50),
    bias=st.floats(-50, 50),
    gamma=st.floats(0, 1e3),
    strength=st.floats(0, 1),
)
def test_norms_stay_bounded(scale, sharpness, bias, gamma, strength):
    memory = scale * torch.randn(1, 2, 8, 4, dtype=torch.float64)
    snr, resonance = filters(sharpness=sharpness, bias=bias, strength=torch.full((2,), strength))
    forgetting = torch.full((1, 2), gamma, dtype=torch.float64)
    out = consolidate(memory, forgetting, Consolidation(64, snr, resonance))
    largest = 1 / (1 - strength * (1 - 1 / snr.eta_boost))
    assert out.norm() <= largest * memory.norm() * (1 + 1e-9)
    gate = resonance_gate(mode_energies(modes(memory, resonance.basis)), resonance)
    assert ((gate >= 0) & (gate <= 1)).all()
