"""Windows of a token stream, packed into batches that keep documents apart."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resolvent.data.stream import TokenStream
from resolvent.errors import ConfigError, DataError


class Batch(NamedTuple):
    """Packed segments of text, each read from a fresh state.

    Attributes:
        input_ids: (1, T) int64.
        labels: (1, T) int64, the token after each of the `input_ids`.
        cu_seqlens: (S + 1,) int64, where the segments begin, from 0, and T.
    """

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device; the copy to a GPU is asynchronous."""
        on_cuda = torch.device(device).type == "cuda"
        return Batch(*((x.pin_memory() if on_cuda else x).to(device, non_blocking=on_cuda) for x in self))

    def padded(self) -> "Batch":
        """Return the batch with empty segments appended, so that the number of segments is a power of two above one.

        A CUDA graph for one number of segments then serves nearly every batch.
        """
        segments = len(self.cu_seqlens) - 1
        empty = (1 << max(1, (segments - 1).bit_length())) - segments
        return self._replace(cu_seqlens=torch.cat([self.cu_seqlens, self.cu_seqlens[-1:].expand(empty)]))


class PackedBatches:
    """Batches of windows for training, as a function of the step: `batches[step]`.

    An epoch cuts the stream, closed to a ring, into windows of `seq_len` predictions from a random position on
    and shuffles them. Position and order are functions of `(seed, epoch)`, so that a run resumes at any step
    without a state. Batches take the windows of one epoch after another, so that each window is used exactly once per
    epoch, even if the batch size does not divide their number. Iteration does not end.

    Args:
        stream: the documents.
        seq_len: predictions of a window.
        batch_size: windows of a batch.
        seed: another seed gives other windows in another order.

    Raises:
        ConfigError: a length, size or seed out of range.
        DataError: a stream shorter than one window.
    """

    def __init__(self, stream: TokenStream, seq_len: int = 256, batch_size: int = 8, seed: int = 0) -> None:
        for name, value, least in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"{name} must be >= {least}, got {value}")
        if stream.num_predictions < seq_len:
            raise DataError(
                f"the data has {stream.num_predictions} tokens to predict, a window of seq_len={seq_len} needs "
                f"{seq_len}; give more text or a seq_len of at most {stream.num_predictions}"
            )
        self.stream = stream
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self._opens_document = np.zeros(stream.num_predictions, bool)
        self._opens_document[stream.starts] = True
        self._epoch: tuple[int, np.ndarray] = (0, self._shuffled_windows(0))

    @property
    def windows_per_epoch(self) -> int:
        """Windows that fit into the stream; the rest, shorter than a window, is left out at a random position."""
        return self.stream.num_predictions // self.seq_len

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in which every window of the first epoch is used."""
        return -(-self.windows_per_epoch // self.batch_size)

    @property
    def tokens_per_batch(self) -> int:
        """Predictions of a batch."""
        return self.batch_size * self.seq_len

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0.

        Raises:
            IndexError: a negative step.
        """
        if step < 0:
            raise IndexError(f"step must be >= 0, got {step}")
        positions = self._window_starts(step)[:, None] + np.arange(self.seq_len)
        positions %= self.stream.num_predictions
        opens_segment = self._opens_document[positions]
        opens_segment[:, 0] = True
        positions = positions.ravel()
        return _batch(self.stream, positions, np.flatnonzero(opens_segment))

    def _window_starts(self, step: int) -> np.ndarray:
        """Return (batch_size,) int64 positions in the stream."""
        numbers = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(numbers, self.windows_per_epoch)
        return np.concatenate([self._windows_of(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def _windows_of(self, epoch: int) -> np.ndarray:
        """Return the shuffled windows of an epoch, cached for the epoch: shuffling costs more than reading a batch."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled_windows(epoch))
        return self._epoch[1]

    def _shuffled_windows(self, epoch: int) -> np.ndarray:
        """Return (windows_per_epoch,) int64 positions on the ring, less than one turn beyond its end."""
        random = np.random.default_rng((self.seed, epoch))
        first = random.integers(self.stream.num_predictions)
        return first + self.seq_len * random.permutation(self.windows_per_epoch)


def documents_as_windows(stream: TokenStream, max_tokens: int) -> Iterator[Batch]:
    """Return the documents for evaluation, in order, each a segment from its opening to before its closing separator.

    Args:
        stream: the documents.
        max_tokens: largest number of predictions of a batch. A longer document is cut, and its parts are segments.

    Returns:
        Batches that predict each token of the stream but the first exactly once.

    Raises:
        ConfigError: a budget below one token.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be >= 1, got {max_tokens}")
    bounds = np.append(stream.starts, stream.num_predictions)
    first = 0
    while first < stream.num_predictions:
        following = bounds[np.searchsorted(bounds, first, side="right") :]
        fitting = following[: np.searchsorted(following, first + max_tokens, side="right")]
        last = int(fitting[-1]) if len(fitting) else first + max_tokens
        yield _batch(stream, np.arange(first, last), np.append(first, fitting[:-1]) - first)
        first = last


def _batch(stream: TokenStream, positions: np.ndarray, segment_starts: np.ndarray) -> Batch:
    """Return the tokens at the positions, the tokens after them, and the bounds of segments, counted from the first."""

    def tensor(ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids.astype(np.int64))

    return Batch(
        input_ids=tensor(stream.tokens[positions])[None],
        labels=tensor(stream.tokens[positions + 1])[None],
        cu_seqlens=tensor(np.append(segment_starts, len(positions))),
    )
