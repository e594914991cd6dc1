"""``observe`` returns a typed record of every layer and changes no number."""

import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from resolvent import create_phase1_model, create_phase2_model
from resolvent.models import IntegratedModel, observe
from resolvent.models.phase1 import Phase1Record
from resolvent.models.phase2 import Phase2Record

from .small import PHASE1, PHASE2, SmallPhase, tokens

BOTH = pytest.mark.parametrize("phase", [PHASE1, PHASE2], ids=["phase1", "phase2"])


def results(model: IntegratedModel, name: str) -> list[Any]:
    """Return a list to which a submodule of every block appends its results."""
    found: list[Any] = []
    for block in model.blocks:
        block.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: found.append(output))
    return found


@BOTH
def test_hidden_states_and_state_equal_those_without_observation(phase: SmallPhase):
    model, ids = phase.model(), tokens()
    _, start = model.hidden_states(tokens(30))
    hidden, state = model.hidden_states(ids, state=start)
    trace = observe(model, ids, state=start)
    assert torch.equal(trace.hidden, hidden)
    assert all(torch.equal(a, b) for a, b in zip(trace.after.tensors(), state.tensors(), strict=True))
    assert trace.before is start
    for record, layer in zip(trace.layers, trace.after.layers, strict=True):
        assert record.state is layer


def test_phase2_records_equal_the_results_of_the_layers():
    model, ids = PHASE2.model(), tokens()
    features, memory, norms, outputs = (results(model, name) for name in ("dissipative_bk", "hebbian", "ln1", ""))
    trace = observe(model, ids)
    for i, record in enumerate(trace.layers):
        assert isinstance(record, Phase2Record)
        assert record.output is outputs[i].output and record.memory_input is norms[i]
        assert (record.features, record.gamma) == features[i][:2]
        assert (record.readout, record.values) == (memory[i].readout, memory[i].values)
    assert torch.equal(trace.vectors, model.token_embedding(ids))
    assert torch.equal(trace.normed, model.ln_f(trace.layers[-1].output))


def test_phase1_records_equal_the_results_of_the_layers():
    model, ids = PHASE1.model(use_gradient_checkpointing=False), tokens()
    features, sums = results(model, "bk"), results(model, "ar_ssm")
    for i, record in enumerate(observe(model, ids).layers):
        assert isinstance(record, Phase1Record)
        assert record.features is features[i][0] and record.gates is sums[i][1]


@BOTH
def test_restore_gives_padded_records_the_shape_of_the_input(phase: SmallPhase):
    model, ids, mask = phase.model(), tokens(50), torch.ones(2, 50)
    mask[0, :20] = 0
    padded, alone = observe(model, ids, attention_mask=mask), observe(model, ids[:1, 20:])
    for record, single in zip(padded.layers, alone.layers, strict=True):
        output = padded.restore(record.output)
        assert record.output.shape == (1, 80, 48) and output.shape == (2, 50, 48)
        torch.testing.assert_close(output[0, 20:], single.output[0], rtol=1e-4, atol=1e-4)
        assert not output[0, :20].any()


@BOTH
def test_records_carry_gradients(phase: SmallPhase):
    model, ids = phase.model(), tokens()
    trace = observe(model, ids)
    inner: list[Tensor] = [trace.vectors, trace.entered, *(record.features for record in trace.layers)]
    assert all(gradient.any() for gradient in torch.autograd.grad(trace.hidden.square().sum(), inner))


@BOTH
def test_observation_leaves_no_hooks(phase: SmallPhase):
    model = phase.model()
    observe(model, tokens())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@BOTH
def test_diagnostics_of_a_trace_equal_those_of_the_forward_pass(phase: SmallPhase):
    model, ids = phase.model(), tokens()
    found, expected = model.diagnostics(observe(model, ids)), model(ids, return_diagnostics=True)[1]
    assert found.keys() == expected.keys()
    for name in ("input_embeddings", "final_hidden_states"):
        assert torch.equal(found[name], expected[name]) and not found[name].requires_grad


@BOTH
@torch.no_grad()
def test_a_pass_without_observation_keeps_one_layer_at_a_time(phase: SmallPhase):
    model, outputs, alive = phase.model(n_layers=4), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, record: outputs.append(weakref.ref(record.output)))
    last = model.blocks[3]
    last.register_forward_pre_hook(lambda *_: alive.append(sum(output() is not None for output in outputs)))
    model(tokens())
    assert alive == [1]
    observe(model, tokens())
    assert alive[1:] == [3]


@torch.no_grad()
@pytest.mark.parametrize("create", [create_phase1_model, create_phase2_model])
def test_diagnostics_cost_at_most_a_fifth_of_the_time(create: Any):
    model = create(preset="tiny", device="cpu").eval()
    ids = torch.randint(0, 257, (1, 512))

    def seconds(**options: bool) -> float:
        start = time.process_time()
        model(ids, **options)
        return time.process_time() - start

    plain, diagnosed = [], []
    for _ in range(6):
        plain.append(seconds())
        diagnosed.append(seconds(return_diagnostics=True))
    assert min(diagnosed) <= 1.2 * min(plain)
