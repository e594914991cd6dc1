import math

import mpmath
import pytest
import torch

from resolvent.layers import MemoryResonanceLayer, ZetaEmbedding, ZetaInitializer, resonance_basis, zeta_zeros
from resolvent.layers.zeta import _resonance_waves, counting_function


@pytest.mark.parametrize("n", [1, 2, 10, 11, 100, 500, 1024])
def test_the_table_holds_the_zeros(n):
    mpmath.mp.dps = 20
    assert zeta_zeros(n)[-1].item() == pytest.approx(float(mpmath.zetazero(n).imag), rel=1e-15)


def test_the_whole_table_rises_and_counts_right():
    zeros = zeta_zeros(1024)
    assert zeros.dtype == torch.float64
    assert (zeros.diff() > 0).all()
    index = torch.arange(1, 1025)
    # The argument function S(t) stays within one here: neither a zero is missing nor one too many.
    assert ((counting_function(zeros) - (index - 0.5)).abs() < 1).all()


def test_beyond_the_table_the_smooth_counting_function_is_inverted():
    zeros = zeta_zeros(5000)
    assert len(zeros) == 5000
    assert torch.equal(zeros[:1024], zeta_zeros(1024))
    assert (zeros.diff() > 0).all()
    torch.testing.assert_close(
        counting_function(zeros[1024:]), torch.arange(1025, 5001).double() - 0.5, rtol=1e-12, atol=0
    )
    mpmath.mp.dps = 20
    assert zeros[1999].item() == pytest.approx(float(mpmath.zetazero(2000).imag), abs=1.0)


def test_positions_are_the_formula_at_any_distance():
    layer = ZetaEmbedding(6, scale=2.0)
    layer.gain.data.fill_(math.atanh(0.5))
    gamma = zeta_zeros(3)
    for position in (0, 1, 77, 10_000_000):
        phase = position / gamma
        expected = torch.stack([phase.sin(), phase.cos()], -1).flatten().float()
        torch.testing.assert_close(layer(torch.tensor([[position]]))[0, 0], expected, rtol=1e-6, atol=1e-7)
    assert layer(torch.tensor([[1, 2]])).shape == (1, 2, 6)
    assert ZetaEmbedding(5)(torch.tensor([3])).shape == (1, 5)


def test_a_fresh_model_reads_no_position_but_can_learn_to():
    layer = ZetaEmbedding(8, trainable=True)
    out = layer(torch.arange(5))
    assert torch.equal(out, torch.zeros(5, 8))
    (out * torch.randn(5, 8)).sum().backward()
    assert layer.gain.grad != 0
    assert {name for name, _ in layer.named_parameters()} == {"gain", "frequency"}
    assert {name for name, _ in ZetaEmbedding(8).named_parameters()} == {"gain"}


@pytest.mark.parametrize("gain", [-1e6, -6.2, 0.03, 6.2, 1e6])
def test_the_amplitude_is_at_most_the_scale(gain):
    layer = ZetaEmbedding(64, scale=0.02)
    layer.gain.data.fill_(gain)
    assert layer(torch.arange(10_000)).abs().max().item() == pytest.approx(min(0.02, 0.02 * abs(gain)), rel=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (16, 64), (64, 16), (3, 100)])
def test_weights_have_the_spectrum_of_the_zeros_and_the_usual_norm(shape):
    weight = torch.zeros(shape)
    ZetaInitializer(torch.Generator().manual_seed(1))(weight, std=0.02)
    spectrum = torch.linalg.svdvals(weight.double())
    ratio = spectrum * zeta_zeros(min(shape))
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
    assert weight.norm().item() == pytest.approx(0.02 * (shape[0] * shape[1]) ** 0.5, rel=1e-5)


def test_the_same_seed_gives_the_same_weights():
    def draw(seed):
        weight = torch.zeros(8, 8)
        ZetaInitializer(torch.Generator().manual_seed(seed))(weight)
        return weight

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    with pytest.raises(ValueError, match="matrices"):
        ZetaInitializer()(torch.zeros(3))


@pytest.mark.parametrize("width", [2, 7, 16, 32, 64, 128])
def test_the_resonance_basis_is_orthonormal_and_well_conditioned(width):
    basis = resonance_basis(width)
    torch.testing.assert_close(basis.T @ basis, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.linalg.cond(_resonance_waves(width)) < 6
    assert torch.equal(basis, resonance_basis(width))


def test_constants_keep_their_precision_when_a_model_is_cast():
    layer = MemoryResonanceLayer(2, 16).bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.basis.value, resonance_basis(16))
    assert torch.equal(layer.double().basis.value, resonance_basis(16))
    assert not layer.state_dict().keys() - {"sharpness", "bias"}
