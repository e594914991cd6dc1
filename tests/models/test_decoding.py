"""One-token steps that keep the state where it is, beside forward passes."""

import pytest
import torch

from resolvent.models.decoding import TokenReader, read_token, step_in_place

from .small import HYBRID, PHASE1, PHASE2, tokens

CASES = {
    "phase1": (PHASE1, {}),
    "phase2": (PHASE2, {}),
    "hybrid": (HYBRID, {}),
    "hybrid without a step of its own": (HYBRID, dict(conv_size=1)),
}
cases = pytest.mark.parametrize(("phase", "options"), CASES.values(), ids=CASES)


@torch.no_grad()
@cases
def test_steps_in_place_update_the_given_tensors(phase, options):
    torch.manual_seed(0)
    model = phase.model(**options)
    _, state = model.hidden_states(tokens(60))
    given = state.clone()
    step = step_in_place(model, given)
    for token in tokens(6).T:
        expected, state = read_token(model, token, state)
        torch.testing.assert_close(step(token), expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(given.tensors(), state.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@cases
def test_state_of_a_reader_is_not_overwritten_by_others(phase, options):
    torch.manual_seed(0)
    model = phase.model(**options)
    reader = TokenReader(model, model.hidden_states(tokens(30))[1].reusable())
    for token in tokens(3).T:
        reader(token)
    state = reader.state
    before = state.clone()
    read_token(model, tokens(1)[:, 0], state)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors(), strict=True))
