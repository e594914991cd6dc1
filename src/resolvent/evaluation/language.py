"""Loss, perplexity and bits per byte of a model over whole documents."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from resolvent.data import TokenStream, encode_documents
from resolvent.errors import DataError, ResolventError
from resolvent.evaluation.scoring import Advance, progress_bar, rectangle, side_by_side
from resolvent.models.inference import inference_view
from resolvent.ops import IGNORED

_STRETCH_TOKENS = 2048
"""Longest stretch of a sample: longer ones sample fewer positions, shorter ones more tokens of little context."""


@dataclass(frozen=True)
class LanguageScore:
    """Score of a model on a text.

    Attributes:
        loss: mean negative log-likelihood in nats per token; the end of text after a document counts as a token.
        perplexity: `exp(loss)`, at most `exp(700)`, near the largest float.
        bits_per_byte: all bits divided by the bytes of the text, which is comparable across tokenizers.
        tokens: number of predicted tokens; of conversations, those of the answers.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    @classmethod
    def from_totals(cls, nats: float, tokens: int, num_bytes: int) -> "LanguageScore":
        """Return the score from sums over all documents.

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


@dataclass(frozen=True)
class Stretches:
    """Parts of a text, each read from a fresh state.

    Attributes:
        sequences: tokens of each part, as in a `TokenStream`; all but the first of a part are predicted, unless they
            are read only.
        num_bytes: bytes of the predicted tokens.
    """

    sequences: list[np.ndarray]
    num_bytes: int

    @property
    def num_predictions(self) -> int:
        """Number of predicted tokens."""
        return sum(int((sequence[1:] >= 0).sum()) for sequence in self.sequences)


def evaluate_documents(
    model: nn.Module,
    documents: list[str] | TokenStream,
    tokenizer: Tokenizer | None = None,
    *,
    max_tokens: int = 0,
    batch_tokens: int = 4096,
    piece_tokens: int = 512,
    progress: bool = False,
) -> LanguageScore:
    """Score documents, each read from its first token to its end of text, or a sample of them.

    Documents of similar length are read side by side, in pieces, with the state of the model carried from one piece to
    the next. So a document may have any length, and neither size below changes the result.

    Args:
        model: a model with the streaming interface; it keeps its mode, and dropout is off (see ``inference_view``).
        documents: texts, or a stream that `encode_documents` made of them.
        tokenizer: encodes the texts; not needed for a stream.
        max_tokens: number of tokens to predict, as `sample_stretches` chooses them; 0 for all.
        batch_tokens: most tokens in one call of the model, which decides the memory.
        piece_tokens: longest piece of a document.
        progress: show a progress bar with the remaining time on stderr.

    Raises:
        ConfigError: the model is in training mode and has no view.
        DataError: there is no text.
        ResolventError: the model's predictions are not finite.
    """
    piece_tokens = min(piece_tokens, batch_tokens)
    if not isinstance(documents, TokenStream):
        if tokenizer is None:
            raise TypeError("evaluate_documents needs a tokenizer to encode texts")
        documents = encode_documents(documents, tokenizer, progress=progress)
    sample = sample_stretches(documents, max_tokens)
    view, sizes = inference_view(model), dict(batch_tokens=batch_tokens, piece_tokens=piece_tokens)
    with progress_bar("Reading", sample.num_predictions, progress) as advance:
        nats = sum_of_nats(view, sample.sequences, **sizes, advance=advance)
    return LanguageScore.from_totals(nats, sample.num_predictions, sample.num_bytes)


def document_tokens(stream: TokenStream) -> list[np.ndarray]:
    """Return the documents of a stream, each with the end-of-text tokens that open and close it."""
    ends = np.append(stream.starts[1:], len(stream.tokens) - 1)
    return [stream.tokens[start : end + 1] for start, end in zip(stream.starts, ends, strict=True)]


def sample_stretches(stream: TokenStream, max_tokens: int) -> Stretches:
    """Sample exactly `max_tokens` predictions of a text, or take all documents if there are no more than that.

    The sample is systematic: the documents, end to end and closed to a ring, give stretches of equal length at equal
    distances, from a position that is drawn once. So every token is in the sample with the same probability, whatever
    the lengths of the documents, and the same budget always gives the same sample. A stretch ends where a document
    ends, and begins with a fresh state: the first tokens of a stretch within a document have less context than in the
    whole document. The bytes of a cut document are counted in proportion to its tokens.

    Conversations stay whole: the sample has about `max_tokens` tokens, and their answers are predicted.

    Args:
        stream: the documents.
        max_tokens: number of tokens to predict; 0 for all.
    """
    total = stream.num_predictions
    if not max_tokens or total <= max_tokens:
        return Stretches(document_tokens(stream), stream.num_bytes)
    if stream.signed:
        return _sample_documents(stream, total, max_tokens)
    count = -(-max_tokens // _STRETCH_TOKENS)
    number = np.arange(count + 1)
    chosen, left_out = number * max_tokens // count, number * (total - max_tokens) // count
    starts = (np.random.default_rng(0).integers(total) + chosen + left_out)[:-1] % total
    ends = starts + np.diff(chosen)
    beyond = max(0, *(ends - total))  # one stretch may pass the end
    spans = [*zip(starts, np.minimum(ends, total), strict=True), (0, beyond)]
    bounds = np.append(stream.starts, total)
    sequences: list[np.ndarray] = []
    for low, high in spans:
        inner = bounds[np.searchsorted(bounds, low, side="right") : np.searchsorted(bounds, high)]
        sequences += [stream.tokens[a : b + 1] for a, b in pairwise((low, *inner, high)) if a < b]
    num_bytes = np.diff(np.interp(spans, bounds, np.append(0, np.cumsum(stream.byte_lengths)))).sum()
    return Stretches(sequences, round(float(num_bytes)))


def _sample_documents(stream: TokenStream, total: int, max_tokens: int) -> Stretches:
    """Return whole documents at equal distances, in number such that they have about `max_tokens` of ``total``."""
    count = max(1, stream.num_documents * max_tokens // total)
    chosen = np.arange(count) * stream.num_documents // count
    ends = np.append(stream.starts[1:], total)
    sequences = [stream.tokens[start : end + 1] for start, end in zip(stream.starts[chosen], ends[chosen], strict=True)]
    return Stretches(sequences, int(stream.byte_lengths[chosen].sum()))


def sum_of_nats(
    model: nn.Module,
    sequences: Sequence[np.ndarray],
    *,
    batch_tokens: int,
    piece_tokens: int,
    advance: Advance | None = None,
) -> float:
    """Return the negative log-likelihood, in nats, of all tokens of sequences except the first of each.

    Args:
        model: a model with the streaming interface; its mode is the caller's choice.
        sequences: tokens, as in a `TokenStream`; those that are read only are not predicted.
        batch_tokens: most tokens in one call of the model.
        piece_tokens: longest piece of a sequence.
        advance: called after every call of the model with the number of tokens that it read.
    """
    device = next(model.parameters()).device
    # Not inference_mode: FSDP makes buffers in the first forward pass, which training uses afterwards.
    with torch.no_grad():
        total = torch.zeros((), dtype=torch.float64, device=device)
        for lanes in _batches(sequences, batch_tokens, piece_tokens):
            state = None
            # The lanes are sorted by falling length, and leave the batch as they end.
            for pieces in side_by_side(lanes, piece_tokens):
                if state is not None:
                    state = state[: len(pieces)]
                inputs, labels = rectangle(pieces)
                loss, state = model(inputs.to(device), labels=labels.to(device), state=state, return_state=True)
                total += loss.double() * int((labels != IGNORED).sum())
                if advance is not None:
                    advance(sum(map(len, pieces)) - len(pieces))
        return total.item()


def calls_of_model(sequences: Sequence[np.ndarray], *, batch_tokens: int, piece_tokens: int) -> int:
    """Return the number of calls of the model by `sum_of_nats`."""
    return sum(-(-(len(lanes[0]) - 1) // piece_tokens) for lanes in _batches(sequences, batch_tokens, piece_tokens))


def _batches(sequences: Sequence[np.ndarray], batch_tokens: int, piece_tokens: int) -> Iterator[list[np.ndarray]]:
    """Yield groups of sequences, longest first, such that no piece of a group exceeds the token budget."""
    ordered = sorted(sequences, key=len, reverse=True)
    while ordered:
        widest_piece = min(len(ordered[0]) - 1, piece_tokens)
        lanes = max(1, batch_tokens // widest_piece)
        yield ordered[:lanes]
        ordered = ordered[lanes:]
