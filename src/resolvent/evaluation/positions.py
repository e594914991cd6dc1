"""Loss of a model on long texts, by the number of tokens read before."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders

from resolvent.data import TokenStream
from resolvent.data.tokenization import byte_lengths
from resolvent.errors import DataError, check_at_least
from resolvent.evaluation.language import document_tokens
from resolvent.evaluation.scoring import Advance, progress_bar, rectangle, score_tokens, side_by_side
from resolvent.evaluation.statistics import Bucket, Estimate, doubling_buckets
from resolvent.models import IntegratedModel
from resolvent.models.inference import inference_view

_PIECE_TOKENS = 512
"""Longest piece of a sequence."""


@dataclass(frozen=True)
class PositionScore:
    """Scores of a bucket of positions.

    Attributes:
        first, last: bounds of the number of tokens read before.
        sequences: number of sequences that reach the bucket.
        tokens: number of predicted tokens.
        loss: nats per token, with the state carried from the beginning.
        bits_per_byte: the same in bits per byte of text; None if the tokenizer does not define a token's bytes.
        windows_loss: nats per token of the same tokens, read in windows of the training length.
        windows_bits_per_byte: the same in bits per byte of text.
        gain: nats per token that the carried state saves against the windows.
    """

    first: int
    last: int
    sequences: int
    tokens: int
    loss: Estimate
    bits_per_byte: float | None
    windows_loss: Estimate
    windows_bits_per_byte: float | None
    gain: Estimate

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.first, self.last)

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, at most `exp(700)`, near the largest float."""
        return math.exp(min(self.loss.mean, 700.0))


@dataclass(frozen=True, repr=False)
class PositionScores:
    """The scores of all buckets.

    Attributes:
        training_length: tokens of the windows.
        rows: scores per bucket.
    """

    training_length: int
    rows: list[PositionScore]

    def __repr__(self) -> str:
        return f"PositionScores({len(self.rows)} rows up to token {self.rows[-1].last:,})"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        rows = [dataclasses.asdict(row) | {"perplexity": row.perplexity} for row in self.rows]
        return {"training_length": self.training_length, "rows": rows}


def evaluate_positions(
    model: IntegratedModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    length: int = 65536,
    sequences: int = 16,
    joined: bool = False,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> PositionScores:
    """Score tokens by their position, with the state carried from the beginning and in windows of the training length.

    The windows overlap by half, and only their second halves count. So a token of the windows has a context of at least
    half the training length, except at the beginning of a text, and the difference is due to earlier tokens.

    Args:
        model: the model; it keeps its mode, dropout is off, and `n_seq` of its configuration is the training length.
        stream: the text.
        tokenizer: its tokenizer.
        length: most tokens per sequence.
        sequences: number of texts: the longest documents, each from its beginning.
        joined: read on from document to document, in sequences of `length` tokens.
        batch_tokens: most tokens in one call of the model.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: a length or a number of sequences below one.
        DataError: there is no text.
        ResolventError: the model's predictions are not finite.
    """
    model = inference_view(model)
    texts = long_texts(stream, length, sequences, joined)
    windows = [_windows(text, model.n_seq) for text in texts]
    total = sum(len(text) - 1 for text in (*texts, *itertools.chain(*windows)))
    with progress_bar("Reading", total, progress) as advance:
        nats = sequence_nats(model, texts, batch_tokens=batch_tokens, advance=advance)
        pieces = list(itertools.chain(*windows))
        remaining = iter(sequence_nats(model, pieces, batch_tokens=batch_tokens, advance=advance))
    alone = [_join_windows([next(remaining) for _ in cuts], model.n_seq) for cuts in windows]
    sizes = token_bytes(tokenizer)
    lengths = None if sizes is None else [sizes[text[1:]] for text in texts]
    rows = [_score(bucket, nats, alone, lengths) for bucket in doubling_buckets(len(texts[0]) - 1)]
    return PositionScores(model.n_seq, rows)


def sequence_nats(
    model: IntegratedModel,
    sequences: Sequence[np.ndarray],
    *,
    batch_tokens: int,
    advance: Advance = lambda _: None,
) -> list[np.ndarray]:
    """Return the negative log-likelihood in nats of every token except the first of each sequence.

    The values are float64, in the order given; the model is in evaluation mode.

    Sequences are read side by side in pieces, with the state carried along.
    """
    device = next(model.parameters()).device
    piece_tokens = min(_PIECE_TOKENS, batch_tokens)
    lanes = batch_tokens // piece_tokens
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
    parts: list[list[np.ndarray]] = [[] for _ in sequences]
    with torch.inference_mode():
        for group in (order[first : first + lanes] for first in range(0, len(order), lanes)):
            state = None
            for pieces in side_by_side([sequences[number] for number in group], piece_tokens):
                inputs, labels = (x.to(device) for x in rectangle(pieces))
                state = None if state is None else state[: len(pieces)]
                hidden, state = model.hidden_states(inputs, state=state)
                nats = score_tokens(model, hidden, labels).nats.double().cpu().numpy()
                for number, piece, row in zip(group[: len(pieces)], pieces, nats, strict=True):
                    parts[number].append(row[: len(piece) - 1])
                advance(sum(len(piece) - 1 for piece in pieces))
    return [np.concatenate(part) for part in parts]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return the number of bytes of every token, int64 (vocabulary,), 0 for the separator of documents.

    None if they depend on the context of a token: without a byte-level decoder, or with a normalizer.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel) or tokenizer.normalizer is not None:
        return None
    return byte_lengths(tokenizer)


def long_texts(stream: TokenStream, length: int, sequences: int, joined: bool) -> list[np.ndarray]:
    """Return token sequences of up to `length + 1` tokens, the longest first."""
    check_at_least(1, length=length, sequences=sequences)
    if not stream.num_bytes:
        raise DataError("there is no text to evaluate: every document is empty")
    if joined:
        texts = [stream.tokens[start : start + length + 1] for start in range(0, stream.num_predictions, length)]
    else:
        texts = [document[: length + 1] for document in document_tokens(stream)]
    return sorted(texts, key=len, reverse=True)[:sequences]


def _windows(text: np.ndarray, width: int) -> list[np.ndarray]:
    """Return windows of `width` predictions, each half a window after the one before."""
    step = max(1, width // 2)
    starts = range(0, max(1, len(text) - 1 - (width - step)), step)
    return [text[start : start + width + 1] for start in starts]


def _join_windows(nats: list[np.ndarray], width: int) -> np.ndarray:
    """Return the nats of the first window and, of each later window, those of tokens beyond the window before."""
    overlap = width - max(1, width // 2)
    return np.concatenate([nats[0], *(window[overlap:] for window in nats[1:])])


def _score(
    bucket: Bucket, nats: list[np.ndarray], alone: list[np.ndarray], lengths: list[np.ndarray] | None
) -> PositionScore:
    def cut(values: list[np.ndarray]) -> list[np.ndarray]:
        return [part for row in values if len(part := row[bucket.first - 1 : bucket.last])]

    carried, windows = cut(nats), cut(alone)
    counts = [len(part) for part in carried]
    sums, sums_of_windows = ([float(part.sum()) for part in parts] for parts in (carried, windows))
    num_bytes = sum(int(part.sum()) for part in cut(lengths)) if lengths is not None else 0

    def bits_per_byte(totals: list[float]) -> float | None:
        return sum(totals) / math.log(2) / num_bytes if num_bytes else None

    return PositionScore(
        first=bucket.first,
        last=bucket.last,
        sequences=len(counts),
        tokens=sum(counts),
        loss=Estimate.of(sums, counts),
        bits_per_byte=bits_per_byte(sums),
        windows_loss=Estimate.of(sums_of_windows, counts),
        windows_bits_per_byte=bits_per_byte(sums_of_windows),
        gain=Estimate.of([b - a for a, b in zip(sums, sums_of_windows, strict=True)], counts),
    )
