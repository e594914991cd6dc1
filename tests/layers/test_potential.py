import pytest
import torch
from torch.nn import functional as F

from resolvent.layers import DissipativeBKLayer, NonHermitianPotential


@pytest.mark.parametrize(
    ("base_decay", "slow", "fast"), [(1e-4, 0.05, 0.5), (0.01, 0.05, 0.5), (0.1, 0.1, 0.5), (0.3, 0.3, 0.6)]
)
def test_gamma_starts_with_one_slow_head_and_the_others_spaced_up_to_one_half(base_decay, slow, fast):
    layer = NonHermitianPotential(16, 8, base_decay=base_decay)
    _, gamma = layer(torch.zeros(1, 1, 16))
    gamma = gamma[0, 0]
    assert gamma[0].item() == pytest.approx(base_decay, rel=1e-4)
    assert gamma[1].item() == pytest.approx(slow, rel=1e-4)
    assert gamma[-1].item() == pytest.approx(fast, rel=1e-4)
    ratios = gamma[2:] / gamma[1:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-4, atol=0)


@pytest.mark.parametrize("heads", [1, 2])
def test_few_heads_start_with_the_slowest(heads):
    _, gamma = NonHermitianPotential(16, heads)(torch.zeros(1, 1, 16))
    assert gamma.shape == (1, 1, heads)
    assert gamma[0, 0, 0].item() == pytest.approx(0.01, rel=1e-4)


def test_gamma_spacing_is_in_units_of_the_time_step():
    gamma = [NonHermitianPotential(8, 4, dt=dt)(torch.zeros(1, 1, 8))[1] * dt for dt in (0.5, 2.0)]
    assert all(g[0, 0, -1].item() == pytest.approx(0.5, rel=1e-4) for g in gamma)


@pytest.mark.parametrize(
    ("base_decay", "least_decay", "least"), [(0.02, 0.015, 0.015), (0.02, None, 1e-4), (1e-4, None, 1e-5)]
)
def test_gamma_never_falls_below_the_least_decay(base_decay, least_decay, least):
    layer = NonHermitianPotential(16, 4, base_decay=base_decay, least_decay=least_decay)
    assert layer(torch.zeros(1, 1, 16))[1][0, 0, 0].item() == pytest.approx(base_decay, rel=1e-4)
    layer.gamma_proj.weight.data.normal_(std=100)
    _, gamma = layer(torch.randn(4, 50, 16))
    assert gamma.min().item() == pytest.approx(least, rel=1e-6)


def test_adaptive_decay_off_keeps_a_trainable_gamma_that_no_token_moves():
    layer = NonHermitianPotential(16, 4, adaptive_decay=False)
    _, gamma = layer(torch.randn(2, 5, 16))
    assert torch.equal(gamma, gamma[:1, :1].expand_as(gamma))
    gamma.sum().backward()
    assert (layer.gamma_bias.grad != 0).all()
    _, adaptive = NonHermitianPotential(16, 4)(torch.randn(2, 5, 16))
    assert not torch.equal(adaptive, adaptive[:1, :1].expand_as(adaptive))


def test_the_memory_feeds_back_from_zero():
    layer = NonHermitianPotential(16, 4, memory_width=8)
    x, readout = torch.randn(2, 5, 16), torch.randn(2, 5, 8)
    fresh, _ = layer(x, readout)
    torch.testing.assert_close(fresh, layer.v_proj(x))
    layer.memory_to_potential.weight.data.normal_()
    expected = layer.v_proj(x) + layer.memory_to_potential(readout) / 8**0.5
    torch.testing.assert_close(layer(x, readout)[0], expected)
    layer.memory_scale = 2.0
    torch.testing.assert_close(layer(x, readout)[0], layer.v_proj(x) + layer.memory_to_potential(2 * readout))


def test_projections_that_are_hooked_are_called_and_give_the_same():
    layer = NonHermitianPotential(16, 4).double()
    x, seen = torch.randn(2, 5, 16, dtype=torch.float64), []
    together = layer(x)
    for projection in (layer.v_proj, layer.gamma_proj):
        projection.register_forward_hook(lambda module, args, output: seen.append(module))
    torch.testing.assert_close(layer(x), together, rtol=1e-12, atol=1e-12)
    assert seen == [layer.v_proj, layer.gamma_proj]


def test_bk_features_are_bounded_for_any_parameters():
    layer = DissipativeBKLayer(NonHermitianPotential(16, 4))
    for parameter in layer.parameters():
        parameter.data.normal_(std=3)
    features, gamma, state = layer(10 * torch.randn(2, 100, 16))
    g = torch.complex(*features.chunk(2, dim=-1))
    bound = 1 / (layer.kappa.abs() * gamma + layer.log_zeta.exp())
    assert (g.abs() <= bound * (1 + 1e-4)).all()
    torch.testing.assert_close(state, g[:, -1])


def test_gamma_acts_in_the_hamiltonian():
    layer = DissipativeBKLayer(NonHermitianPotential(16, 4))
    x = torch.randn(1, 20, 16)
    with_gamma = layer(x)[0]
    layer.kappa.data.zero_()
    without = layer(x)[0]
    layer.potential.gamma_bias.data.add_(3)
    assert not torch.equal(with_gamma, without)
    assert torch.equal(layer(x)[0], without)


def test_every_parameter_of_the_hamiltonian_learns():
    layer = DissipativeBKLayer(NonHermitianPotential(16, 4, memory_width=8))
    features, _, _ = layer(torch.randn(2, 30, 16), torch.randn(2, 30, 8))
    F.mse_loss(features, torch.randn_like(features)).backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_a_strength_of_zero_is_exact_and_can_leave_zero():
    layer = DissipativeBKLayer(NonHermitianPotential(16, 4))
    x = torch.randn(2, 10, 16)
    layer.kappa.data.zero_()
    features, _, _ = layer(x)
    layer.potential.gamma_bias.data.add_(5)
    assert torch.equal(layer(x)[0], features)
    features.square().sum().backward()
    assert (layer.kappa.grad != 0).all()
