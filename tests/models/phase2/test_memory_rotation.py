"""Models whose memories rotate: with and without the filters of consolidation."""

import pytest
import torch

from resolvent.models.decoding import CapturedStep
from resolvent.models.phase2 import Phase2State
from resolvent.models.phase2.block import blocks_of
from resolvent.ops.consolidation import signal_to_noise

from ..small import tokens
from .conftest import small_model

FILTERS = {
    "plain": dict(snr_enabled=False, resonance_enabled=False),
    "consolidated": {},
    "thirds": dict(memory_rotation_orders=(2, 3)),
}


def model_with(kind):
    return small_model(spread=0.1, memory_rotation=True, **FILTERS[kind])


def without_rotation(kind):
    filters = FILTERS[kind] | dict(memory_rotation_orders=(2,))
    return small_model(spread=0.1, **filters)


@torch.no_grad()
@pytest.mark.parametrize("kind", FILTERS)
def test_a_constant_added_to_all_phases_changes_no_logit(kind):
    model, ids = model_with(kind), tokens(200)
    _, state = model(ids, return_state=True)
    fresh = state.map(torch.zeros_like)
    layers = (layer._replace(phases=torch.rand_like(layer.phases)) for layer in fresh.layers)
    turned = model(ids, state=Phase2State(fresh.position, tuple(layers)))
    torch.testing.assert_close(turned, model(ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids), without_rotation(kind)(ids), atol=1e-2)


@torch.no_grad()
def test_phases_move_in_float64_whatever_the_state_is():
    _, state = model_with("consolidated")(tokens(5), return_state=True)
    assert {layer.phases.dtype for layer in state.to(torch.float32).layers} == {torch.float64}
    assert {layer.phases.dtype for layer in state.to(torch.float64).layers} == {torch.float64}


def test_training_reaches_the_projection_of_the_angles():
    model, ids = model_with("consolidated").train(), tokens(200)
    model(ids[:, :-1], labels=ids[:, 1:]).backward()
    for block in blocks_of(model):
        assert block.hebbian.rotation_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_diagnostics_do_not_depend_on_the_frame():
    model, ids = model_with("consolidated"), tokens(70)
    _, state, found = model(ids, return_state=True, return_diagnostics=True)
    fresh = state.map(torch.zeros_like)
    layers = (layer._replace(phases=torch.rand_like(layer.phases)) for layer in fresh.layers)
    *_, turned = model(ids, state=Phase2State(fresh.position, tuple(layers)), return_diagnostics=True)
    for part in ("snr_stats", "resonance_info"):
        for a, b in zip(found[part], turned[part], strict=True):
            for name in a:
                torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    pairs = signal_to_noise(state.layers[0].memory.memory, paired=True).amax((-2, -1))
    torch.testing.assert_close(found["snr_stats"][0]["max_snr"], pairs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("kind", FILTERS)
def test_captured_steps_equal_one_forward(kind):
    model, ids = model_with(kind).cuda(), tokens(140).cuda()
    _, state = model(ids[:, :60], return_state=True)
    token, found = ids[:, 60].clone(), []
    step = CapturedStep(model, state.clone().with_position_on(ids.device), token)
    for following in ids[:, 60:].T:
        token.copy_(following)
        found.append(step().clone())
    torch.testing.assert_close(torch.stack(found, 1), model(ids)[:, 60:], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FILTERS)
def test_gradients_on_the_gpu_equal_float64_on_the_cpu(kind):
    model, ids = model_with(kind), tokens(300)
    exact = model_with(kind).double()
    exact.load_state_dict(model.state_dict())
    model.cuda()
    model(ids[:, :-1].cuda(), labels=ids[:, 1:].cuda()).backward()
    exact(ids[:, :-1], labels=ids[:, 1:]).backward()
    for found, expected in zip(model.parameters(), exact.parameters(), strict=True):
        error = (found.grad.cpu().double() - expected.grad).norm()
        assert error <= 1e-3 * expected.grad.norm() + 1e-7
