"""Prompts read in pieces: any lengths, any split, packed or not, captured or not."""

import pytest
import torch

from resolvent.models import reading
from resolvent.models.reading import LEAST_ON_CUDA, PIECE, CapturedPiece, piece_length, read_prompts

from .graphs import launched
from .small import FULL, HYBRID, PHASE1, PHASE2, tokens

PHASES = dict(phase1=PHASE1, phase2=PHASE2, hybrid=HYBRID, full=FULL)


@pytest.fixture(params=PHASES.values(), ids=PHASES.keys())
def model(request):
    torch.manual_seed(0)
    return request.param.model()


def masks(*lengths, width=100):
    """Return a mask of prompts of some lengths, padded on the left in even rows and on the right in odd rows."""
    rows = [[0] * (width - n) + [1] * n if i % 2 else [1] * n + [0] * (width - n) for i, n in enumerate(lengths)]
    return torch.tensor(rows)


@torch.no_grad()
def test_ragged_prompts_in_pieces_equal_single_prompts(model, monkeypatch):
    monkeypatch.setattr(reading, "piece_length", lambda *_: 30)
    ids, mask = tokens(100, 4), masks(100, 7, 30, 61)
    hidden, state = read_prompts(model, ids, mask)
    for i in range(4):
        alone, own = model.hidden_states(ids[i][mask[i].bool()].unsqueeze(0))
        torch.testing.assert_close(hidden[i], alone[0, -1], rtol=1e-4, atol=1e-4)
        if model.state_grows:
            continue  # its buffers have room for the longest prompt
        for found, expected in zip(state[[i]].tensors(), own.tensors(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_read_returns_the_last_logits_and_the_state(model):
    ids = tokens(60)
    whole, after = model(ids, return_state=True)
    logits, state = model.read(ids[:, 20:], state=model.read(ids[:, :20])[1])
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(state.position, after.position)
    padded, _ = model.read(ids, attention_mask=masks(60, 9, width=60))
    torch.testing.assert_close(padded[1], model(ids[1:, -9:])[0, -1], rtol=1e-4, atol=1e-4)


def test_prompt_without_a_token_is_refused(model):
    with pytest.raises(ValueError, match="attention_mask leaves a prompt without any token"):
        model.read(tokens(10), attention_mask=masks(10, 0, width=10))


def test_pieces_on_cuda_hold_as_many_numbers_for_any_batch():
    cuda = torch.device("cuda")
    assert piece_length(1, 512, cuda) == 2 * piece_length(2, 512, cuda) == 2 * piece_length(1, 1024, cuda) == 65_536
    assert piece_length(1000, 4096, cuda) == LEAST_ON_CUDA
    assert piece_length(8, 512, torch.device("cpu")) == PIECE


@torch.inference_mode()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("phase", [PHASE1, PHASE2, HYBRID], ids=["phase1", "phase2", "hybrid"])
def test_captured_pieces_equal_forward_passes(phase, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(reading, "captured", launched)
    torch.manual_seed(0)
    model, ids = phase.model().to(device), tokens(200, 3).to(device)
    fresh = model.hidden_states(ids[:1, :1])[1].map(torch.zeros_like)
    piece, states, read = CapturedPiece(model, fresh, 3, 120), [None] * 3, [0] * 3
    for lengths in ([50, 5, 0], [7, 70, 10], [0, 1, 90], [64, 4, 0], [1, 1, 1]):
        parts = [ids[i, read[i] : read[i] + n] for i, n in enumerate(lengths)]
        hidden = piece(torch.cat(parts), lengths)
        for i, part in enumerate(parts):
            if len(part):
                expected, states[i] = model.hidden_states(part.unsqueeze(0), state=states[i])
                torch.testing.assert_close(hidden[i], expected[0, -1], rtol=1e-3, atol=1e-3)
                read[i] += len(part)
    for i, state in enumerate(states):
        for found, expected in zip(piece.take(slice(i, i + 1)).tensors(), state.tensors(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    piece.put([states[2], None])
    assert piece.take(slice(0, 2)).position.tolist() == [read[2], 0]
