"""However much was streamed, the state is that of the tokens it still remembers."""

import math

import pytest
import torch
from torch import Tensor

from resolvent import Phase1IntegratedModel, Phase2IntegratedModel, create_phase1_model, create_phase2_model
from resolvent.models.state import ModelState

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PIECE = 65_536
REMEMBERED = 8_192
"""Tokens after which nothing is left of what was before: ``Γ dt >= 0.01`` a token."""
VOCABULARY = 64
SIZES = dict(vocab_size=VOCABULARY, d_model=8, n_layers=1, n_seq=64, num_heads=1, dropout=0.0)


def piece(number: int, length: int, device: str) -> Tensor:
    random = torch.Generator().manual_seed(number)
    return torch.randint(VOCABULARY, (1, length), generator=random).to(device)


def minute_model(device: str) -> Phase2IntegratedModel:
    """A model that reads positions, in the slowest memory that its configuration allows."""
    model = create_phase2_model(**SIZES, head_dim=8, base_decay=0.015, least_decay=0.01, device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape).to(device), alpha=0.3)
        model.position_embedding.gain.fill_(5.0)
        model.blocks[0].dissipative_bk.potential.gamma_bias.fill_(-20.0)
        model.blocks[0].dissipative_bk.potential.gamma_proj.weight.zero_()
        model.blocks[0].dissipative_bk.log_zeta.fill_(math.log(0.02))
    return model.eval()


def from_nothing(state: ModelState, position: int) -> ModelState:
    """A state that has read ``position`` tokens and remembers none."""
    empty = state.map(torch.zeros_like)
    return type(empty)(torch.full_like(state.position, position), empty.layers)


def assert_no_drift(device: str, pieces: int, piece_tokens: int) -> None:
    model, state = minute_model(device), None
    for number in range(pieces):
        ids = piece(number, piece_tokens, device)
        hidden, state = model.hidden_states(ids, state=state)
    assert state is not None and state.position.tolist() == [pieces * piece_tokens]
    fresh = from_nothing(state, pieces * piece_tokens - REMEMBERED)
    found, last = model.hidden_states(ids[:, -REMEMBERED:], state=fresh)
    torch.testing.assert_close(found[:, -100:], hidden[:, -100:], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(last.tensors(), state.tensors(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    # Another position tells another state: the test would see a drift of it.
    elsewhere = from_nothing(state, pieces * piece_tokens - REMEMBERED + 64)
    moved, _ = model.hidden_states(ids[:, -REMEMBERED:], state=elsewhere)
    assert (moved - hidden[:, -REMEMBERED:]).abs().max() > 1e-2
    for number in range(3):  # and token by token from here
        token = piece(number, 1, device)
        (a, state), (b, last) = (model.hidden_states(token, state=x) for x in (state, last))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_state_does_not_drift_over_three_hundred_thousand_tokens(device: str):
    assert_no_drift(device, pieces=20, piece_tokens=16_384)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_state_does_not_drift_over_ten_million_tokens(device: str):
    assert_no_drift(device, pieces=-(-10_000_000 // PIECE), piece_tokens=PIECE)


def assert_sum_is_exact(device: str, pieces: int, piece_tokens: int) -> None:
    """A semiseparable layer forgets nothing: its sum is compared with that of the same model in float64."""
    model: Phase1IntegratedModel = create_phase1_model(**SIZES, ar_ssm_max_rank=4, htt_rank=4, device=device).eval()
    exact = create_phase1_model(**SIZES, ar_ssm_max_rank=4, htt_rank=4, device=device).eval()
    exact.load_state_dict(model.state_dict())
    exact.double()
    state, reference = None, None
    for number in range(pieces):
        ids = piece(number, piece_tokens, device)
        hidden, state = model.hidden_states(ids, state=state)
        expected, reference = exact.hidden_states(ids, state=reference)
    torch.testing.assert_close(hidden.double(), expected, rtol=1e-3, atol=1e-4)
    ours, theirs = (x.layers[0].ar_ssm.total for x in (state, reference))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_sum_over_three_hundred_thousand_tokens_is_exact(device: str):
    assert_sum_is_exact(device, pieces=20, piece_tokens=16_384)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_sum_over_ten_million_tokens_is_exact(device: str):
    assert_sum_is_exact(device, pieces=-(-10_000_000 // PIECE), piece_tokens=PIECE)
