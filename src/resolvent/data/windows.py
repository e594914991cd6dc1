"""Windows of a token stream, packed into batches that keep documents apart."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resolvent.data.stream import TokenStream, inputs_and_labels
from resolvent.errors import ConfigError, DataError, check_at_least
from resolvent.ops import IGNORED
from resolvent.wording import counted

MIXED_WINDOWS = 4096
"""Windows of which every stream of a mixture gives its share: weights are rounded to a part of so many."""


class Batch(NamedTuple):
    """Packed segments of text, each read from a fresh state.

    Attributes:
        input_ids: (1, T) int64.
        labels: (1, T) int64, the token after each of the `input_ids`, or -100 where it is not predicted.
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


class Window(NamedTuple):
    """Consecutive tokens of a stream.

    Attributes:
        inputs: (N,) tokens.
        labels: (N,), the token after each of them, or -100 where it is not predicted.
        openings: positions in the window where a document begins.
    """

    inputs: np.ndarray
    labels: np.ndarray
    openings: np.ndarray


class _Batches:
    """Batches of windows, which a subclass numbers through all epochs.

    Args:
        seq_len: predictions of a window.
        batch_size: windows of a batch.
        seed: another seed gives other windows in another order.
    """

    def __init__(self, seq_len: int, batch_size: int, seed: int) -> None:
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed

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
        return _batch([self.window(step * self.batch_size + i) for i in range(self.batch_size)])

    def window(self, number: int) -> Window:
        """Return the window of a number, counted from 0 through all epochs."""
        raise NotImplementedError


class PackedBatches(_Batches):
    """Batches of windows for training, as a function of the step: `batches[step]`.

    An epoch cuts the stream, closed to a ring, into windows of `seq_len` predictions from a random position on
    and shuffles them. Position and order are functions of `(seed, epoch)`, so that a run resumes at any step
    without a state. Batches take the windows of one epoch after another, so that each window is used exactly once per
    epoch, even if the batch size does not divide their number. Iteration does not end.

    In a signed stream, no window predicts the rest of a conversation that begins in another one, if a window could hold
    the whole: the answers in the rest lack their questions.

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
        check_at_least(1, seq_len=seq_len, batch_size=batch_size)
        check_at_least(0, seed=seed)
        if stream.num_predictions < seq_len:
            raise DataError(
                f"the data has {counted(stream.num_predictions, 'token')} to read, and a window of "
                f"seq_len={seq_len} needs {seq_len}; give more text, or a seq_len (--seq-len) of at most "
                f"{stream.num_predictions}"
            )
        super().__init__(seq_len, batch_size, seed)
        self.stream = stream
        self._epoch: tuple[int, np.ndarray] = (0, self._shuffled_windows(0))

    @property
    def windows_per_epoch(self) -> int:
        """Windows that fit into the stream; the rest, shorter than a window, is left out at a random position."""
        return self.stream.num_predictions // self.seq_len

    def window(self, number: int) -> Window:
        epoch, index = divmod(number, self.windows_per_epoch)
        ring = self.stream.num_predictions
        start = int(self._windows_of(epoch)[index]) % ring
        end = start + self.seq_len
        if end <= ring:
            window = _window(self.stream, start, end)
        else:
            window = _end_to_end([_window(self.stream, start, ring), _window(self.stream, 0, end - ring)])
        if self.stream.signed:
            window.labels[: self._without_question(start)] = IGNORED
        return window

    def _without_question(self, start: int) -> int:
        """Return the number of predictions in the rest of a conversation that a window could hold whole."""
        starts = self.stream.starts
        following = int(np.searchsorted(starts, start, side="right"))
        end = int(starts[following]) if following < len(starts) else self.stream.num_predictions
        first = int(starts[following - 1])
        return end - start if first < start and end - first <= self.seq_len else 0

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


class MixedBatches(_Batches):
    """Batches of windows of several streams, mixed by weight, by the number of the step alone: `batches[step]`.

    Of every `MIXED_WINDOWS` windows, each stream gives its share, in an order drawn from seed and block. The windows
    of a stream are those of its `PackedBatches`, in their order, so that streams go through their epochs one by one.

    Args:
        streams: each with its weight; only their ratios count.
        seq_len: predictions of a window.
        batch_size: windows of a batch.
        seed: another seed gives other windows in another order.

    Raises:
        ConfigError: a length, size, seed or weight out of range.
        DataError: a stream shorter than one window.
    """

    def __init__(
        self, streams: Sequence[tuple[TokenStream, float]], seq_len: int = 256, batch_size: int = 8, seed: int = 0
    ) -> None:
        super().__init__(seq_len, batch_size, seed)
        self.parts = [PackedBatches(stream, seq_len, batch_size, seed) for stream, _ in streams]
        self.counts = _shares([weight for _, weight in streams])
        self._block: tuple[int, np.ndarray] = (0, self._order(0))

    def window(self, number: int) -> Window:
        block, index = divmod(number, MIXED_WINDOWS)
        if self._block[0] != block:
            self._block = (block, self._order(block))
        order = self._block[1]
        stream = int(order[index])
        earlier = int(np.count_nonzero(order[:index] == stream))
        return self.parts[stream].window(block * int(self.counts[stream]) + earlier)

    def _order(self, block: int) -> np.ndarray:
        """Return the stream of every window of a block, (`MIXED_WINDOWS`,)."""
        streams = np.repeat(np.arange(len(self.counts)), self.counts)
        return np.random.default_rng((self.seed, block)).permutation(streams)


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Return how many of `MIXED_WINDOWS` windows each stream gives, the largest remainders rounded up."""
    shares = np.array(weights) / sum(weights) * MIXED_WINDOWS
    if min(shares) < 1:
        raise ConfigError(f"a weight must be at least 1/{MIXED_WINDOWS} of all weights, got {list(weights)}")
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: MIXED_WINDOWS - int(counts.sum())]] += 1
    return counts


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
    check_at_least(1, max_tokens=max_tokens)
    bounds = np.append(stream.starts, stream.num_predictions)
    first = 0
    while first < stream.num_predictions:
        following = bounds[np.searchsorted(bounds, first, side="right") :]
        fitting = following[: np.searchsorted(following, first + max_tokens, side="right")]
        last = int(fitting[-1]) if len(fitting) else first + max_tokens
        yield _batch([_window(stream, first, last)])
        first = last


def _window(stream: TokenStream, start: int, end: int) -> Window:
    first, last = np.searchsorted(stream.starts, (start, end))
    inputs, labels = inputs_and_labels(stream.tokens[start : end + 1])
    return Window(inputs, labels, stream.starts[first:last] - start)


def _end_to_end(windows: Sequence[Window]) -> Window:
    offsets = np.cumsum([0, *(len(window.inputs) for window in windows)])
    openings = [window.openings + offset for window, offset in zip(windows, offsets[:-1], strict=True)]
    inputs, labels = ([getattr(window, name) for window in windows] for name in ("inputs", "labels"))
    return Window(np.concatenate(inputs), np.concatenate(labels), np.concatenate(openings))


def _batch(windows: Sequence[Window]) -> Batch:
    """Lay windows end to end; a segment begins with each, and with each document in them."""
    opened = [window._replace(openings=np.union1d(window.openings, [0])) for window in windows]
    inputs, labels, openings = _end_to_end(opened)

    bounds = np.append(openings, len(inputs))
    input_ids, labels, cu_seqlens = map(torch.from_numpy, (inputs, labels, bounds))
    return Batch(input_ids[None], labels[None], cu_seqlens)
