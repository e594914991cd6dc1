"""Traces equal one forward pass of the model."""

from typing import Any

import pytest
import torch

from resolvent.inspection.attention import largest_weights
from resolvent.inspection.trace import trace_text
from resolvent.models import observe
from resolvent.models.phase1 import Phase1IntegratedModel
from resolvent.models.phase2 import Phase2IntegratedModel, convert_phase1_to_phase2
from tests.models.small import HYBRID, PHASE1, PHASE2, tokens

CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=1e-5)


def phase2(**options: Any) -> Phase2IntegratedModel:
    model = PHASE2.model(**options)
    assert isinstance(model, Phase2IntegratedModel)
    return model


@pytest.mark.parametrize("stride", [1, 7, 64, 1000])
@pytest.mark.parametrize("options", [{}, {"snr_enabled": False}, {"resonance_enabled": False, "conv_size": 1}])
def test_trace_equals_one_pass(options: dict[str, Any], stride: int):
    model, ids = phase2(**options), tokens(150, 1)[0]
    seen = trace_text(model, ids, stride=stride)
    whole = observe(model, ids[None])
    hidden, state, found = whole.hidden, whole.after, model.diagnostics(whole)
    torch.testing.assert_close(seen.hidden, hidden[0].detach(), **CLOSE)
    assert seen.places == [*range(stride - 1, 149, stride), 149]
    for i, layer in enumerate(seen.layers):
        assert layer.gamma is not None and layer.memory is not None
        stability = found["stability_metrics"][i]
        torch.testing.assert_close(layer.gamma, found["gamma_values"][i][0], **CLOSE)
        torch.testing.assert_close(layer.resolvent[-1], state.layers[i].resolvent[0].detach(), **CLOSE)
        torch.testing.assert_close(layer.memory.last, state.layers[i].memory.memory[0].detach(), **CLOSE)
        torch.testing.assert_close(layer.memory.energy[-1], stability["energy"][0], **CLOSE)
        torch.testing.assert_close(layer.memory.bound[-1], stability["energy_bound"][0], **CLOSE)


def test_traces_stay_within_their_bounds():
    for layer in trace_text(phase2(), tokens(300, 1)[0]).layers:
        assert layer.memory is not None
        assert (layer.memory.energy <= layer.memory.bound).all()
        assert (layer.memory.bound.diff(dim=0) >= 0).all()
        assert (layer.resolvent.abs() <= layer.resolvent_bound * (1 + 1e-6)).all()
        assert layer.resolvent.abs().max() > 0.1 * layer.resolvent_bound.min()


def test_phase_1_has_a_resolvent_alone():
    model, ids = PHASE1.model(), tokens(60, 1)[0]
    seen = trace_text(model, ids)
    assert isinstance(model, Phase1IntegratedModel)
    _, state = model.hidden_states(ids[None])
    for layer, after in zip(seen.layers, state.layers, strict=True):
        torch.testing.assert_close(layer.resolvent[-1], after.resolvent[0].detach(), **CLOSE)
        assert layer.resolvent.shape == (60, 3) and (layer.resolvent.abs() <= layer.resolvent_bound).all()
        assert layer.gamma is None and layer.memory is None


def test_a_converted_model_has_the_resolvent_of_its_source():
    source = PHASE1.model()
    ids = tokens(40, 1)[0]
    theirs, ours = trace_text(source, ids), trace_text(convert_phase1_to_phase2(source), ids)
    for before, after in zip(theirs.layers, ours.layers, strict=True):
        torch.testing.assert_close(after.resolvent, before.resolvent, **CLOSE)


def test_trace_does_not_change_the_model():
    model = phase2().train()
    trace_text(model, tokens(20, 1)[0])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("window", [9, None])
def test_distances_are_those_of_the_weights(window: int | None):
    model, ids = HYBRID.model(attention_window=window), tokens(60, 1)
    found = trace_text(model, ids[0])
    assert [layer.memory is None for layer in found.layers] == [False, True, False]
    assert [layer.attention is None for layer in found.layers] == [True, False, True]
    attention, record = model.blocks[1].attention, observe(model, ids).layers[1]
    heads = attention.heads(attention.qkv_proj(record.memory_input), None, None)
    q, k = attention.rotated(heads, torch.arange(60).unsqueeze(0))
    back = torch.arange(60)[:, None] - torch.arange(60)
    scores = torch.einsum("qhk,shk->hqs", q[0] * attention.temperature[:, None], k[0])
    visible = (back >= 0) & (back < (window or 60))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(found.layers[1].attention.distance, (weights * back).sum(-1).T, rtol=1e-4, atol=1e-4)
    assert found.layers[1].attention is not None
    largest, places = weights.topk(4, dim=-1)
    torch.testing.assert_close(found.layers[1].attention.weights, largest, rtol=1e-4, atol=1e-5)
    seen = largest > 1e-3
    assert torch.equal(found.layers[1].attention.places[seen], places[seen])


def test_largest_weights_in_several_blocks():
    torch.manual_seed(0)
    layer = HYBRID.model().blocks[1].attention
    x = torch.randn(600, 48)
    weights, places = largest_weights(layer, x)
    assert weights.shape == places.shape == (3, 600, 4)
    back = torch.arange(600)[:, None] - places
    assert ((back >= 0) & (back < 24))[weights > 0].all()
    first, _ = largest_weights(layer, x[:100])
    torch.testing.assert_close(weights[:, :100], first)
    assert largest_weights(layer, x[:2])[0].shape == (3, 2, 2)
