import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resolvent.layers import (
    DissipativeHebbianLayer,
    LyapunovStabilityMonitor,
    MemoryResonanceLayer,
    SNRMemoryFilter,
)
from resolvent.ops import Consolidation, MemoryState, dissipative_memory


@pytest.mark.parametrize("options", [{}, {"conv_size": 1}, {"output_gate": False}, {"output_norm": False}])
def test_shapes_with_and_without_options(options):
    layer = DissipativeHebbianLayer(32, 2, 8, **options)
    out = layer(torch.randn(3, 70, 32), torch.rand(3, 70, 2))
    assert out.gated.shape == (3, 70, 16)
    assert out.readout.shape == (3, 70, 16)
    assert out.state.memory.shape[1:] == layer.state_shape[0]
    assert out.conv_tail.shape[1:] == layer.state_shape[1]


def test_options_remove_their_parameters():
    names = {name for name, _ in DissipativeHebbianLayer(32, 2, 8, conv_size=1, output_gate=False).named_parameters()}
    assert names == {"log_eta", "qkv_proj.weight", "out_proj.weight"}


def test_the_read_out_has_unit_rms():
    layer = DissipativeHebbianLayer(32, 2, 8, eta=100.0)
    readout = layer(torch.randn(3, 70, 32), torch.rand(3, 70, 2)).readout.unflatten(-1, (2, 8))
    torch.testing.assert_close(readout.square().mean(-1), torch.ones(3, 70, 2), rtol=0.05, atol=0)


def test_eta_and_dt_reach_the_memory():
    def state(**options):
        torch.manual_seed(0)
        layer = DissipativeHebbianLayer(32, 2, 8, **options)
        return layer(torch.randn(1, 20, 32), torch.ones(1, 20, 2) * 0.3).state

    torch.testing.assert_close(state(eta=0.4).memory, 4 * state(eta=0.1).memory)
    torch.testing.assert_close(state(dt=0.5).memory, state(dt=0.5).memory)
    assert state(dt=0.5).memory.norm() > state(dt=2.0).memory.norm()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    decay=st.floats(1e-4, 5.0),
    eta=st.floats(1e-3, 10.0),
    size=st.floats(1e-3, 1e3),
    boosts=st.tuples(st.floats(1.0, 20.0), st.floats(1.0, 20.0)),
    threshold=st.floats(0.01, 4.0),
    sharpness=st.floats(-20, 20),
    bias=st.floats(-20, 20),
    strength=st.one_of(st.none(), st.floats(0.0, 1.0)),
    interval=st.sampled_from([64, 128, 192]),
    same_token=st.booleans(),
    cut=st.integers(1, 399),
    fading=st.sampled_from([1.0, 1e-3, 0.0]),
)
def test_the_energy_bound_holds(
    seed, decay, eta, size, boosts, threshold, sharpness, bias, strength, interval, same_token, cut, fading
):
    torch.manual_seed(seed)
    length, heads, width = 400, 2, 8
    resonance = MemoryResonanceLayer(heads, width)
    resonance.sharpness.data.fill_(sharpness)
    resonance.bias.data.fill_(bias)
    snr = filter_of(strength, heads, gamma_boost=boosts[0], eta_boost=boosts[1], threshold=threshold)
    rule = Consolidation(interval, snr.constants(), resonance.constants())
    k, v = torch.randn(2, 1, length, heads, width, dtype=torch.float64)
    if same_token:  # the worst case: every write adds to the last
        k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    k, v = torch.nn.functional.normalize(k, dim=-1), size * v
    v = torch.cat([v[:, :cut], fading * v[:, cut:]], dim=1)
    gamma = decay * (1 + torch.rand(1, length, heads, dtype=torch.float64) * (not same_token))
    etas = torch.full((heads,), eta, dtype=torch.float64)
    before = None
    for piece in (slice(0, cut), slice(cut, length)):
        position = torch.tensor([piece.start])
        parts = [x[:, piece] for x in (k, k, v, gamma)]
        _, after = dissipative_memory(*parts, etas, initial_state=before, position=position, consolidation=rule)
        metrics = LyapunovStabilityMonitor.metrics(
            before or MemoryState(*map(torch.zeros_like, after)),
            after,
            (etas * v[:, piece].norm(dim=-1)).amax(1),
            gamma[:, piece].amin(1),
            torch.tensor([piece.stop - piece.start]),
            snr.amplification,
        )
        assert (metrics["energy"] <= metrics["energy_bound"] * (1 + 1e-6)).all()
        before = after


def filter_of(strength, heads=1, **options):
    """A filter whose heads have this strength, or full strength that is not trained."""
    snr = SNRMemoryFilter(heads, trained=strength is not None, **options)
    if snr.strength_logit is not None:
        snr.strength_logit.data.fill_(strength).logit_()
    return snr


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, None])
def test_the_energy_bound_follows_the_strength(strength):
    amplification = filter_of(strength, 2, eta_boost=3.0).amplification
    initial, write, decay = torch.ones(1, 2), torch.ones(1, 2), torch.full((1, 2), math.log(2))
    expected = ((1 + 2) / (1 - (1.0 if strength is None else strength) * (1 - 1 / 3))) ** 2
    bound = LyapunovStabilityMonitor.bound(initial, write, decay, amplification)
    torch.testing.assert_close(bound, torch.full((1, 2), expected))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, None])
def test_the_energy_bound_is_reached(strength):
    """Signal alone, the same in every token and strongly forgotten: the memory settles where its bound is."""
    snr = filter_of(strength, threshold=1e-6, temperature=1e-3, eta_boost=3.0)
    rule = Consolidation(64, snr.constants())
    k = torch.ones(1, 64 * 20, 1, 4, dtype=torch.float64) / 2
    decay, eta = torch.full(k.shape[:3], 0.05, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    _, after = dissipative_memory(k, k, k, decay, eta, consolidation=rule)
    before, elapsed = MemoryState(*map(torch.zeros_like, after)), torch.full((1,), 64 * 20)
    write = torch.ones(1, 1, dtype=torch.float64)
    metrics = LyapunovStabilityMonitor.metrics(before, after, write, decay[:, 0], elapsed, snr.amplification)
    assert 0.999 < (metrics["energy"] / metrics["energy_bound"]).item() <= 1 + 1e-6


def test_the_energy_rate_is_a_difference_quotient():
    one = torch.ones(1, 1)
    before, after = (MemoryState(torch.full((1, 1, 2, 2), x), one) for x in (0.0, 1.0))
    metrics = LyapunovStabilityMonitor.metrics(before, after, one, one, torch.tensor([8.0]), torch.ones(1))
    assert metrics["energy"].item() == 4
    assert metrics["energy_rate"].item() == 0.5


def test_statistics_of_the_filters():
    memory = torch.zeros(1, 1, 4, 4)
    memory[0, 0, 1, 2] = 3.0
    snr = SNRMemoryFilter(1, threshold=2.0).statistics(memory)
    assert snr["max_snr"].item() == pytest.approx(4.0)  # |S| = 3, rms = 3/4
    assert snr["low_snr_ratio"].item() == pytest.approx(15 / 16)
    assert snr["strength"].item() == pytest.approx(1 / (1 + math.exp(6)))
    layer = MemoryResonanceLayer(1, 4, energy_threshold=0.5)
    mode = layer.basis.value[:, 2].float().unsqueeze(-1).expand(4, 4).view(1, 1, 4, 4)
    info = layer.statistics(mode)
    assert info["resonance_mask"].tolist() == [[[False, False, True, False]]]
    assert info["num_resonant"].item() == 1
    assert info["sparsity_ratio"].item() == pytest.approx(0.75)
    assert info["total_energy"].item() == pytest.approx(4.0, rel=1e-5)


def test_the_snr_filter_starts_near_the_identity_and_can_be_opened():
    layer = SNRMemoryFilter(3)
    strength = layer().strength
    torch.testing.assert_close(strength, torch.full((3,), 0.00247), rtol=0.01, atol=0)
    strength.sum().backward()
    assert (layer.strength_logit.grad > 0).all()
    assert layer.bfloat16()().strength.dtype == torch.float32


def test_a_filter_that_is_not_trained_has_full_strength():
    layer = SNRMemoryFilter(3, trained=False)
    assert list(layer.parameters()) == [] and layer().strength is None
    assert torch.equal(layer.statistics(torch.randn(2, 3, 4, 4))["strength"], torch.ones(2, 3))


def test_autocast_keeps_what_all_projections_read_only_once():
    layer, x = DissipativeHebbianLayer(32, 2, 16), torch.randn(2, 20, 32)
    cast, kept = x.bfloat16(), set()

    def look(saved):
        if (
            saved.dtype == torch.bfloat16
            and saved.numel() == x.numel()
            and torch.equal(saved.reshape(cast.shape), cast)
        ):
            kept.add(saved.untyped_storage().data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(look, lambda saved: saved), torch.autocast("cpu", torch.bfloat16):
        layer(x, torch.rand(2, 20, 2))
    assert len(kept) == 1


def rotating_layer(**options):
    layer = DissipativeHebbianLayer(32, 2, 8, rotation=True, **options)
    torch.nn.init.normal_(layer.rotation_proj.weight, std=0.3)
    return layer


def test_angles_are_those_of_the_projection():
    layer, x = rotating_layer(dt=0.5), torch.randn(2, 70, 32)
    out = layer(x, torch.rand(2, 70, 2))
    projected = x.double() @ layer.rotation_proj.weight.double().T
    turns = 0.5 * (projected.sign() * (projected.abs() - 0.25).clamp(0, 0.5)).sum(1) - out.phases
    assert out.phases.dtype == torch.float64
    assert (turns - turns.round()).abs().max() < 1e-5


def test_angles_are_of_float32_under_autocast():
    layer, x = rotating_layer(), torch.randn(1, 300, 32).bfloat16().float()
    exact, _ = layer.phases(x, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = layer.phases(x, None, None)
    assert torch.equal(found, exact)


def test_without_rotation_there_is_no_projection_and_no_phase():
    layer = DissipativeHebbianLayer(32, 2, 8)
    assert not any("rotation" in name for name, _ in layer.named_parameters())
    assert layer(torch.randn(1, 5, 32), torch.rand(1, 5, 2)).phases is None


def test_the_memory_can_tell_even_from_odd_numbers_of_half_turns():
    """Half a turn per token, and next to no decay: what was written first comes back with the sign of the distance."""
    layer = rotating_layer(conv_size=1, output_norm=False, output_gate=False)
    with torch.no_grad():
        layer.rotation_proj.weight.zero_()[:, 0] = 20.0
        layer.qkv_proj.weight.zero_()[16:32, 1] = 1.0  # keys of the first token
        layer.qkv_proj.weight[:16, 0] = 1.0  # queries of all
        layer.qkv_proj.weight[32:, 1] = 1.0  # values of the first
    x = torch.zeros(1, 8, 32)
    x[..., 0], x[:, 0, 1] = 1.0, 1.0
    readout = layer(x, torch.full((1, 8, 2), 1e-6)).readout[0, :, 0]
    assert (readout.sign() * readout[0].sign()).tolist() == [1, -1, 1, -1, 1, -1, 1, -1]
