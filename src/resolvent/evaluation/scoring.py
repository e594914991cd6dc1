"""Scoring of long texts, piece by piece, with the state of the model carried along.

Shapes: B sequences, N tokens, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from resolvent.data import TokenStream
from resolvent.data.stream import inputs_and_labels
from resolvent.errors import DataError
from resolvent.models import IntegratedModel
from resolvent.ops import IGNORED
from resolvent.ops.precision import at_least_float32
from resolvent.wording import counted

_LOGITS_BYTES = 2**27
"""Memory for the logits that are held at once."""

Advance = Callable[[int], None]
"""Callback with the number of tokens read."""


class TokenScores(NamedTuple):
    """Scores of predicted tokens.

    Attributes:
        nats: negative log-likelihood, float (B, N), zero at ignored positions.
        likeliest: whether no other token was likelier, bool (B, N), true at ignored positions.
    """

    nats: Tensor
    likeliest: Tensor


@contextmanager
def progress_bar(title: str, tokens: int, show: bool) -> Iterator[Advance]:
    """Show a progress bar with the remaining time on stderr; yield the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, *times, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(title, total=tokens)
        yield lambda read: bar.advance(task, read)


def score_tokens(model: IntegratedModel, hidden: Tensor, labels: Tensor) -> TokenScores:
    """Score the next tokens, one chunk of logits at a time.

    Args:
        model: the model whose head is used.
        hidden: final hidden states (B, N, D).
        labels: next tokens, int64 (B, N), or -100 at ignored positions.
    """
    chunk = max(1, _LOGITS_BYTES // (4 * model.vocab_size))
    nats, likeliest = [], []
    for states, wanted in zip(hidden.flatten(0, 1).split(chunk), labels.flatten().split(chunk), strict=True):
        logits = at_least_float32(model.lm_head(states))
        nats.append(F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none"))
        likeliest.append((logits.argmax(-1) == wanted) | (wanted == IGNORED))
    return TokenScores(torch.cat(nats).view(labels.shape), torch.cat(likeliest).view(labels.shape))


def rectangle(pieces: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return inputs (B, N) and labels of pieces of at most N + 1 tokens.

    Inputs are padded with token 0, labels with -100, which also stands for tokens that are read only.
    """
    rows = [inputs_and_labels(piece) for piece in pieces]
    inputs, labels = ([torch.from_numpy(column) for column in columns] for columns in zip(*rows, strict=True))
    return pad_sequence(inputs, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def side_by_side(lanes: Sequence[np.ndarray], piece_tokens: int) -> Iterator[list[np.ndarray]]:
    """Yield pieces of sequences of falling length; sequences leave the end of the list as they end.

    A piece has one token of context and up to `piece_tokens` tokens to predict.
    """
    for start in range(0, len(lanes[0]) - 1, piece_tokens):
        yield [lane[start : start + piece_tokens + 1] for lane in lanes if len(lane) - 1 > start]


def separator_of(stream: TokenStream) -> int:
    """Return the token that opens and closes documents."""
    return int(stream.tokens[0])


def excerpts(stream: TokenStream, count: int, length: int, random: np.random.Generator) -> np.ndarray:
    """Return stretches of a text, its documents joined without separators, (count, length); they may overlap.

    Raises:
        DataError: the text is too short.
    """
    is_text = np.ones(len(stream.tokens), bool)
    is_text[stream.starts] = is_text[-1] = False
    text = stream.tokens[is_text].astype(np.int64)
    if len(text) < length:
        raise DataError(
            f"the text has {counted(len(text), 'token')}, a sequence needs {length:,}: give more text or a "
            "shorter length"
        )
    starts = random.integers(len(text) - length + 1, size=count)
    return np.stack([text[start : start + length] for start in starts])
