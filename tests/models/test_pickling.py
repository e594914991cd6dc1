"""Models, their states and diagnostics are pickled and copied: by ``torch.save`` and for processes that are spawned."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch

from resolvent import convert_phase1_to_phase2

from .small import PHASE1, PHASE2, tokens


def pickled(x):
    return pickle.loads(pickle.dumps(x))


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [pickled, saved, copy.deepcopy]


def models():
    phase1, phase2 = PHASE1.model(), PHASE2.model()
    trainable = PHASE2.model()
    trainable.recompute_blocks()
    waves = PHASE2.model(zeta_embedding_trainable=True)
    return {
        "phase1": phase1,
        "phase2": phase2,
        "converted": convert_phase1_to_phase2(phase1).eval(),
        "recomputing": trainable,
        "waves": waves,
    }


@pytest.mark.parametrize("again", COPIES)
@pytest.mark.parametrize("name", ["phase1", "phase2", "converted", "recomputing", "waves"])
def test_model_stays_what_it_is(name, again):
    model, ids = models()[name], tokens(70)
    other = again(model)
    assert other.config == model.config and other.tied == model.tied
    assert torch.equal(other(ids), model(ids))
    assert torch.equal(other.half().float()(ids), model.half().float()(ids)), (
        "exact constants are made anew after a cast"
    )


@pytest.mark.parametrize("again", COPIES)
@pytest.mark.parametrize("small", [PHASE1, PHASE2])
def test_states_and_diagnostics_stay_what_they_are(small, again):
    model = small.model()
    with torch.no_grad():
        _, state, diagnostics = model(tokens(70), return_state=True, return_diagnostics=True)
        other_state, other_diagnostics = again((state, diagnostics))
        more = tokens(5)
        assert torch.equal(model(more, state=other_state), model(more, state=state))
    assert other_diagnostics.keys() == diagnostics.keys()
    assert torch.equal(other_diagnostics["final_hidden_states"], diagnostics["final_hidden_states"])


def answer(model, ids, sender):
    sender.send(model(ids).numpy())  # as bytes: a tensor is shared memory, which is gone once this process ends


@pytest.mark.slow
def test_model_goes_to_a_spawned_process():
    model, ids = PHASE2.model().requires_grad_(False), tokens(70)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(model, ids, sender))
    process.start()
    assert receiver.poll(120), "the process answers"
    assert torch.equal(torch.from_numpy(receiver.recv()), model(ids))
    process.join(10)
    assert process.exitcode == 0
