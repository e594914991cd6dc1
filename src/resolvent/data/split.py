"""Split of documents into a training and a held-out part."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from resolvent.errors import ConfigError, DataError

_TOLERANCE = 0.2
"""Tolerance of the size of the smaller part, as a fraction of the size."""

CutDocuments = Callable[[Mapping[int, float]], Mapping[int, int | None]]
"""Cuts documents, given by number, each at a part of its bytes: the first byte after the cut, or None."""

logger = logging.getLogger(__name__)


def split_documents(
    documents: list[str], validation_fraction: float = 0.1, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split documents into a training and a held-out part with a given share of the bytes.

    1. A text larger than the target size of the smaller part is cut: the share is held out from the end of the text.
    2. Other texts are held out whole, in the order of a hash of text and seed, up to the share.
    3. If whole texts miss the share by more than a fifth of the share, the text at which it is reached is cut, too.

    A cut is at the start of a line if one is near. Equal documents are treated alike, and the result does not depend on
    the order of the documents. If no cut brings the held-out part to within a fifth of the share, a warning is logged.
    The rule depends on the hash and the length of every text, and on the characters of those that are cut.

    Args:
        documents: the documents.
        validation_fraction: the share of the bytes to hold out, between 0 and 1, both excluded.
        seed: another seed gives another split.

    Returns:
        Training and held-out documents, each at least one and in the order given. A document that is cut is in both.

    Raises:
        ConfigError: a fraction that is not between 0 and 1.
        DataError: no documents, or a single one too short to be cut.
    """
    data = [text.encode() for text in documents]
    keys, sizes = [DocumentKey(seed) for _ in data], np.array([len(text) for text in data], np.int64)
    for key, text in zip(keys, data, strict=True):
        key.update(text)

    def cut(parts: Mapping[int, float]) -> dict[int, int | None]:
        return {number: _cut_of([documents[number]], len(data[number]), part) for number, part in parts.items()}

    held = held_out_from(np.array([key.value() for key in keys], np.uint64), sizes, validation_fraction, cut)
    if warning := share_warning(sizes, held, validation_fraction):
        logger.warning(warning)
    pairs = [(text[:first].decode(), text[first:].decode()) for text, first in zip(data, held.tolist(), strict=True)]
    return [part for part, held_out in pairs if part or not held_out], [held_out for _, held_out in pairs if held_out]


class DocumentKey:
    """The first 64 bits of the SHA-256 of a seed and a text, which comes in pieces."""

    def __init__(self, seed: int = 0) -> None:
        self._digest = hashlib.sha256(f"{seed}\n".encode())

    def update(self, text: bytes) -> None:
        """Add the next piece."""
        self._digest.update(text)

    def value(self) -> int:
        """Return the key of the text so far."""
        return int.from_bytes(self._digest.digest()[:8], "big")


def held_out_from(keys: np.ndarray, sizes: np.ndarray, fraction: float, cut_documents: CutDocuments) -> np.ndarray:
    """Apply the rule of `split_documents` to keys and sizes.

    It takes some tens of bytes of memory per document, whatever the length of their texts.

    Args:
        keys: (D,) uint64, `DocumentKey` of every document. Documents of equal key are treated alike.
        sizes: (D,) int64, the bytes of every document. One without any is in no part.
        fraction: the share of the bytes to hold out.
        cut_documents: cuts documents.

    Returns:
        (D,) int64: the first byte of every document that is held out: 0 for the whole of it, its size for nothing.

    Raises:
        ConfigError: a fraction that leaves a side empty.
        DataError: no documents, or a single one too short to be cut.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation_fraction must be between 0 and 1, got {fraction}")
    present = np.flatnonzero(sizes)
    if not len(present):
        raise DataError("there are no documents to split; give at least one")
    _, first, group = np.unique(keys[present], return_index=True, return_inverse=True)  # in the order of the keys
    first, copies = present[first], np.bincount(group)
    total = np.bincount(group, weights=sizes[present]).astype(np.int64)
    smaller_part = min(fraction, 1 - fraction) * int(total.sum())
    held = sizes[first].copy()
    # 1. Texts that no part can take whole.
    large = total > smaller_part
    for number, cut in cut_documents({int(n): 1 - fraction for n in first[large]}).items():
        if cut is not None:
            held[first == number] = cut
    is_cut = held < sizes[first]
    wanted = fraction * int(total.sum()) - int((copies * (sizes[first] - held)).sum())
    # 2. Whole texts. Those that are large and yet too short to be cut come last.
    order = np.concatenate([np.flatnonzero(~is_cut & ~large), np.flatnonzero(~is_cut & large)])
    sums = np.concatenate([[0], np.cumsum(total[order])])
    fewest = 0 if is_cut.any() else 1  # so that no part is empty
    counts = np.arange(fewest, len(sums) - fewest)
    if not len(counts):
        raise DataError(
            f"one document of {sizes[first[order[0]]]} bytes is too short to hold out {fraction:.0%} of it; "
            "give more text or several documents"
        )
    count = int(counts[np.argmin(np.abs(sums[counts] - wanted))])
    # 3. The text in which the share is reached.
    last = bisect_right(sums, wanted) - 1
    if abs(int(sums[count]) - wanted) > _TOLERANCE * smaller_part and 0 <= last < len(order):
        number = int(first[order[last]])
        (cut,) = cut_documents({number: 1 - (wanted - int(sums[last])) / int(total[order[last]])}).values()
        if cut is not None:
            count, held[order[last]] = last, cut
    held[order[:count]] = 0
    result = np.zeros(len(sizes), np.int64)
    result[present] = held[group]
    return result


def share_warning(sizes: np.ndarray, held: np.ndarray, fraction: float) -> str | None:
    """Return a warning where the held-out part misses its share by more than a fifth; else None."""
    share = int((sizes - held).sum()) / int(sizes.sum())
    if abs(share - fraction) <= _TOLERANCE * min(fraction, 1 - fraction):
        return None
    return (
        f"{share:.1%} of the bytes are held out instead of {fraction:.0%}: the documents are too few, "
        "or equal, and too short to be cut"
    )


def _cut_of(pieces: Iterable[str], size: int, part: float) -> int | None:
    search = CutSearch(size, part)
    for piece in pieces:
        search.add(piece)
    return search.result()


class CutSearch:
    """Search for the place where a document is cut at a part of its bytes, while its pieces go by.

    Args:
        size: bytes of the document.
        part: the part of them that comes before the cut.
    """

    def __init__(self, size: int, part: float) -> None:
        self._size, self._middle = size, round(size * part)
        self._read, self._character = 0, size
        self._line_before, self._line_after = 0, 0
        self._text_begins, self._text_ends = size, 0

    def add(self, text: str) -> None:
        """Add the next piece."""
        data, middle = text.encode(), self._middle - self._read
        if middle > 0 and (newline := data.rfind(b"\n", 0, middle)) >= 0:
            self._line_before = self._read + newline + 1
        if not self._line_after and middle < len(data) and (newline := data.find(b"\n", max(0, middle))) >= 0:
            self._line_after = self._read + newline + 1
        if 0 <= middle < len(data):
            self._character = self._read + len(data[:middle].decode(errors="ignore").encode())
        if text and not text.isspace():
            blank = len(text) - len(text.lstrip())
            self._text_begins = min(self._text_begins, self._read + len(text[:blank].encode()))
            self._text_ends = self._read + len(text.rstrip().encode())
        self._read += len(data)

    def result(self) -> int | None:
        """Return the first byte after the cut: the start of the nearest line if that is near, or None.

        None if a side would have no text.
        """
        nearest = min(self._line_before, self._line_after, key=lambda start: abs(start - self._middle))
        near = _TOLERANCE / 2 * min(self._middle, self._size - self._middle)
        cut = nearest if abs(nearest - self._middle) <= near else self._character
        return cut if self._text_begins < cut < self._text_ends else None
