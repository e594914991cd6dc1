"""Layout of tokens on the programs of the memory's kernels.

Shapes: N sequence, H heads, S sequences, G segments, M chunks.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..memory_state import CHUNK, lengths_and_elapsed

_LEAST_PROGRAMS, _WANTED_PROGRAMS = 64, 528
"""Below the first number of programs, one per head of a sequence, a GPU stays empty; the second fills it four times."""
_SHORTEST_SEGMENT = 8
"""Least chunks of a segment, unless a boundary ends it before: each chunk is read twice."""


@dataclass(frozen=True)
class Layout:
    """Tokens that each program walks over.

    Attributes:
        segments: one row a segment, int64 (G, 6): its first and its last token + 1; the place of its first chunk's
            first slot, which lies up to 63 slots before the first token where the sequence goes on inside a chunk; the
            number of its first chunk; the chunks since the last boundary; the number of its first boundary. Segments of
            a sequence that is cut do not reach across a boundary.
        chunks: one row a chunk, its segment and its number in it, int64 (M, 2).
        first_segment: of every sequence, int64 (S + 1,); None where sequences are whole segments.
    """

    segments: Tensor
    chunks: Tensor
    first_segment: Tensor | None = None

    @property
    def segmented(self) -> bool:
        """Return True if a sequence is cut into segments."""
        return self.first_segment is not None and len(self.segments) > len(self.first_segment) - 1


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept for later calls must serve training, too
def _layout(
    lengths: tuple[int, ...], elapsed: tuple[int, ...], longest_segment: int, interval: int, device: torch.device
) -> Layout:
    """Make the layout.

    Args:
        lengths: tokens of the sequences.
        elapsed: tokens that the sequences have read since their last boundary.
        longest_segment: in chunks, 0 for no limit.
        interval: tokens between boundaries, 0 without boundaries.
        device: device of the tables.
    """
    segments, first_segment, chunks, start, chunk, boundary = [], [0], [], 0, 0, 0
    for length, since in zip(lengths, elapsed, strict=True):
        end, slot, since_boundary = start + length, start - since % CHUNK, since // CHUNK
        while True:
            longest = min(longest_segment, interval // CHUNK - since_boundary) if interval else longest_segment
            stop = end if longest_segment == 0 else min(end, slot + longest * CHUNK)
            count = -(-(stop - slot) // CHUNK) if stop > start else 0
            chunks += [(len(segments), i) for i in range(count)]
            segments.append((max(start, slot), stop, slot, chunk, since_boundary, boundary))
            boundary += (since_boundary * CHUNK + stop - slot) // interval if interval else 0
            slot, chunk = slot + count * CHUNK, chunk + count
            since_boundary = (since_boundary + count) % (interval // CHUNK) if interval else 0
            if stop == end:
                break
        first_segment.append(len(segments))
        start = end
    table = (torch.tensor(rows, dtype=torch.int64) for rows in (segments, chunks, first_segment))
    return Layout(*(_on(rows, device) for rows in table))


def _on(x: Tensor, device: torch.device) -> Tensor:
    """Return a copy on ``device`` that is kept, without waiting for the work that is queued there.

    A thread of its own makes the copy: while a CUDA graph is captured, memory that the capturing thread allocates
    belongs to the graph.
    """
    if device.type != "cuda":
        return x
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_copied, x, device).result()


def _copied(x: Tensor, device: torch.device) -> Tensor:
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        copy = x.pin_memory().to(device, non_blocking=True)
    stream.synchronize()
    return copy


def layout_of(q: Tensor, position: Tensor | None, cu_seqlens: Tensor | None, interval: int) -> Layout:
    """Return the layout of sequences whose offsets Python reads; long ones are cut where there are few programs."""
    lengths, elapsed = lengths_and_elapsed(q, position, cu_seqlens, interval)
    heads, longest = q.shape[2], 0
    chunks = [-(-n // CHUNK) for n in lengths]
    if len(lengths) * heads < _LEAST_PROGRAMS and max(chunks, default=0) > _SHORTEST_SEGMENT:
        longest = max(_SHORTEST_SEGMENT, triton.next_power_of_2(-(-sum(chunks) * heads // _WANTED_PROGRAMS)))
    return _layout(lengths, elapsed, longest, interval, q.device)


def tables_on_device(
    cu_seqlens: Tensor | None, position: Tensor | None, tokens: int, interval: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``segments`` and ``chunks`` of packed sequences with offsets on a device; None where Python reads them.

    The tables are made in front of the operator, not in it: ``torch.compile`` then sees that all layers make the same
    tables and makes them once per step, forward and backward; without it the operator keeps them for its gradient.
    """
    if cu_seqlens is None or not _stays_on_device(cu_seqlens):
        return None, None
    return layout_on_device(cu_seqlens, position if interval else None, tokens, interval)


def _stays_on_device(cu_seqlens: Tensor) -> bool:
    """Return True if offsets are on a device, where Python does not read them."""
    return cu_seqlens.device.type != "cpu"


def layout_on_device(cu_seqlens: Tensor, position: Tensor | None, tokens: int, interval: int) -> tuple[Tensor, Tensor]:
    """Return ``segments`` and ``chunks`` of packed sequences without reading their offsets.

    So a step can be replayed with other offsets. Sequences are whole segments. There are as many rows of chunks as
    there may be chunks; the rows left over have no token.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    since = torch.zeros_like(starts) if position is None else position.to(starts.device) % interval
    slots = starts - since % CHUNK
    counts = torch.where(ends > starts, (ends - slots + CHUNK - 1) // CHUNK, 0)
    boundaries = (since + ends - starts) // interval if interval else torch.zeros_like(starts)
    last, met = torch.stack([counts, boundaries]).cumsum(1)
    segments = torch.stack([starts, ends, slots, last - counts, since // CHUNK, met - boundaries], dim=1)
    row = torch.arange(most_chunks(tokens, len(starts), position is not None), device=starts.device)
    segment = torch.searchsorted(last, row, right=True)
    there = segment < len(starts)
    segment = torch.where(there, segment, 0)
    chunk = torch.where(there, row - (last - counts)[segment], tokens)
    return segments, torch.stack([segment, chunk], dim=1)


def most_chunks(tokens: int, sequences: int, goes_on: bool) -> int:
    """Return the largest number of chunks of packed sequences.

    Each may end inside a chunk and, if it goes on inside one (``goes_on``), touch one more.
    """
    return tokens // CHUNK + (2 if goes_on else 1) * sequences
