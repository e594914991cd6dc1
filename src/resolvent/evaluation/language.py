"""How well a model predicts text: loss, perplexity and bits per byte over whole documents."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from resolvent.data import TokenStream, encode_documents
from resolvent.errors import DataError, ResolventError
from resolvent.evaluation.reading import rectangle, side_by_side
from resolvent.models.inference import inference_view
from resolvent.ops import IGNORED


@dataclass(frozen=True)
class LanguageScore:
    """What a model makes of a text.

    Attributes:
        loss: mean nats a token; the tokens of a document are followed by the end of text, which counts as one.
        perplexity: `exp(loss)`, or `exp(700)`, near the largest float, where it is more.
        bits_per_byte: all bits divided by the bytes of the text, which compares models whatever their tokenizer.
        tokens: number of predicted tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    @classmethod
    def from_totals(cls, nats: float, tokens: int, num_bytes: int) -> "LanguageScore":
        """Score from sums over all documents.

        Raises:
            DataError: there is no text.
            ResolventError: the model's predictions are not finite.
        """
        if not num_bytes:
            raise DataError("there is no text to evaluate: every document is empty")
        if not math.isfinite(nats):
            raise ResolventError(f"the model's loss on this text is {nats}: its weights or logits are not finite")
        loss = nats / tokens
        return cls(loss, math.exp(min(loss, 700.0)), nats / math.log(2) / num_bytes, tokens)


def evaluate_documents(
    model: nn.Module,
    documents: list[str] | TokenStream,
    tokenizer: Tokenizer | None = None,
    *,
    batch_tokens: int = 4096,
    piece_tokens: int = 512,
) -> LanguageScore:
    """Score whole documents, each read from its first token to its end of text.

    Documents of similar length go through the model side by side, in pieces, with the model's state handed from a
    piece to the next. So a document may be of any length, and neither size below changes the result.

    Args:
        model: a model with the streaming interface; it keeps its mode, and dropout is off (see ``inference_view``).
        documents: texts, or a stream that `encode_documents` made of them.
        tokenizer: encodes the texts; not needed for a stream.
        batch_tokens: most tokens in one call of the model: the memory that this takes.
        piece_tokens: longest piece of a document.

    Raises:
        ConfigError: the model is in training mode and has no view.
        DataError: there is no text.
        ResolventError: the model's predictions are not finite.
    """
    piece_tokens = min(piece_tokens, batch_tokens)
    if not isinstance(documents, TokenStream):
        if tokenizer is None:
            raise TypeError("evaluate_documents needs a tokenizer to encode texts")
        documents = encode_documents(documents, tokenizer)
    sequences = document_tokens(documents)
    nats = sum_of_nats(inference_view(model), sequences, batch_tokens=batch_tokens, piece_tokens=piece_tokens)
    tokens = sum(len(sequence) - 1 for sequence in sequences)
    return LanguageScore.from_totals(nats, tokens, int(documents.num_bytes))


def document_tokens(stream: TokenStream) -> list[np.ndarray]:
    """The documents of a stream, each with the end-of-text tokens that open and close it."""
    ends = np.append(stream.starts[1:], len(stream.tokens) - 1)
    return [stream.tokens[start : end + 1] for start, end in zip(stream.starts, ends, strict=True)]


def sum_of_nats(model: nn.Module, sequences: Sequence[np.ndarray], *, batch_tokens: int, piece_tokens: int) -> float:
    """Sum the negative log-likelihood of every sequence's tokens but its first, in nats; the model's mode is the
    caller's choice."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        total = torch.zeros((), dtype=torch.float64, device=device)
        for lanes in _batches(sequences, batch_tokens, piece_tokens):
            total += _batch_nats(model, lanes, piece_tokens, device)
        return total.item()


def calls_of_model(sequences: Sequence[np.ndarray], *, batch_tokens: int, piece_tokens: int) -> int:
    """How often `sum_of_nats` calls the model."""
    return sum(-(-(len(lanes[0]) - 1) // piece_tokens) for lanes in _batches(sequences, batch_tokens, piece_tokens))


def _batches(sequences: Sequence[np.ndarray], batch_tokens: int, piece_tokens: int) -> Iterator[list[np.ndarray]]:
    """Groups of sequences, longest first, such that no piece of a group exceeds the token budget."""
    ordered = sorted(sequences, key=len, reverse=True)
    while ordered:
        widest_piece = min(len(ordered[0]) - 1, piece_tokens)
        lanes = max(1, batch_tokens // widest_piece)
        yield ordered[:lanes]
        ordered = ordered[lanes:]


def _batch_nats(model: nn.Module, lanes: list[np.ndarray], piece_tokens: int, device: torch.device) -> torch.Tensor:
    """Sum over lanes of falling length, which drop out of the batch as they end."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    state = None
    for pieces in side_by_side(lanes, piece_tokens):
        if state is not None:
            state = state[: len(pieces)]
        inputs, labels = rectangle(pieces)
        loss, state = model(inputs.to(device), labels=labels.to(device), state=state, return_state=True)
        total += loss.double() * (labels != IGNORED).sum()
    return total
