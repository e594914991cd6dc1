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


def test_the_snr_filter_is_its_formula():
    memory, writes = torch.randn(2, 1, 2, 8, 4, dtype=torch.float64)
    forgetting = torch.rand(1, 2, dtype=torch.float64)
    snr, _ = filters()
    found = consolidate(memory, writes, forgetting, Consolidation(64, snr))
    for head in range(2):
        s, dw = memory[0, head], writes[0, head]
        p = torch.sigmoid((s.abs() / s.square().mean().sqrt() - 2.0) / 0.5)
        expected = s * torch.exp(-2.0 * forgetting[0, head] * (1 - p)) + 0.5 * p * dw
        torch.testing.assert_close(found[0, head], expected, rtol=1e-12, atol=1e-12)


def test_the_snr_filter_acts_at_its_strength():
    memory, writes = torch.randn(2, 1, 2, 8, 4, dtype=torch.float64)
    forgetting = torch.rand(1, 2, dtype=torch.float64)
    snr, _ = filters(strength=torch.tensor([0.3, 0.8], dtype=torch.float64))
    found = consolidate(memory, writes, forgetting, Consolidation(64, snr))
    for head, strength in enumerate((0.3, 0.8)):
        s, dw = memory[0, head], writes[0, head]
        p = torch.sigmoid((s.abs() / s.square().mean().sqrt() - 2.0) / 0.5)
        expected = s * torch.exp(-strength * 2.0 * forgetting[0, head] * (1 - p)) + strength * 0.5 * p * dw
        torch.testing.assert_close(found[0, head], expected, rtol=1e-12, atol=1e-12)


def test_the_resonance_is_its_formula():
    memory = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    _, resonance = filters(sharpness=1.7, bias=-0.3)
    found = consolidate(memory, memory, memory[..., 0, 0], Consolidation(64, None, resonance))
    q = resonance.basis
    for head in range(2):
        spectrum = q.T @ memory[0, head]
        energy = spectrum.square().sum(1)
        gate = torch.sigmoid(1.7 * (energy / energy.mean() - 0.1) - 0.3)
        torch.testing.assert_close(found[0, head], q @ torch.diag(gate) @ spectrum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["snr", "strength", "resonance", "both"])
def test_the_written_out_gradient_is_autograds(which):
    memory, writes, grad = torch.randn(3, 2, 2, 8, 4, dtype=torch.float64)
    forgetting = torch.rand(2, 2, dtype=torch.float64)
    strength = None if which == "snr" else torch.tensor([0.0, 0.7], dtype=torch.float64)
    snr, resonance = filters(sharpness=1.3, bias=0.2, strength=strength)
    of_memory, of_modes = which != "resonance", which in ("resonance", "both")
    rule = Consolidation(64, snr if of_memory else None, resonance if of_modes else None)
    sources = [memory, writes, forgetting, *rule.parameters]
    assert len(sources) == 3 + {"snr": 0, "strength": 1, "resonance": 2, "both": 3}[which]
    for source in sources:
        source.requires_grad_()
    expected = torch.autograd.grad(consolidate(memory, writes, forgetting, rule), sources, grad, materialize_grads=True)
    with torch.no_grad():
        found = consolidate_gradient(grad, memory, writes, forgetting, rule)
    for a, b in zip((*found[:3], *found.parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_written_out_gradient_is_that_of_small_changes():
    memory, writes, grad = torch.randn(3, 2, 2, 8, 4, dtype=torch.float64)
    forgetting = torch.rand(2, 2, dtype=torch.float64)
    snr, resonance = filters(sharpness=1.3, bias=0.2, strength=torch.tensor([0.2, 0.7], dtype=torch.float64))
    rule = Consolidation(64, snr, resonance)
    found = consolidate_gradient(grad, memory, writes, forgetting, rule)
    gradients, places = (*found[:3], *found.parameters), (memory, writes, forgetting, *rule.parameters)

    def loss():
        return (grad * consolidate(memory, writes, forgetting, rule)).sum()

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
    out = consolidate(memory, torch.zeros_like(memory), torch.ones(1, 2), Consolidation(64, *filters()))
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert memory.grad.isfinite().all()


def test_filters_do_not_depend_on_the_memorys_scale():
    memory = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    rule = Consolidation(64, *filters())
    small, large = (consolidate(c * memory, c * memory, torch.ones(1, 2), rule) / c for c in (1e-4, 1e4))
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
    memory, writes = scale * torch.randn(2, 1, 2, 8, 4, dtype=torch.float64)
    snr, resonance = filters(sharpness=sharpness, bias=bias, strength=torch.full((2,), strength))
    forgetting = torch.full((1, 2), gamma, dtype=torch.float64)
    out = consolidate(memory, writes, forgetting, Consolidation(64, snr, resonance))
    limit = memory.norm() + strength * (snr.eta_boost - 1) * writes.norm()
    assert out.norm() <= limit * (1 + 1e-9)
    gate = resonance_gate(mode_energies(modes(memory, resonance.basis)), resonance)
    assert ((gate >= 0) & (gate <= 1)).all()
