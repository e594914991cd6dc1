"""Split of documents into a training and a held-out part."""

import hashlib
import logging
from bisect import bisect_right
from collections import Counter
from itertools import accumulate

from resolvent.errors import ConfigError, DataError

_TOLERANCE = 0.2
"""Tolerance of the size of the smaller part, as a fraction of the size."""

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
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if not any(documents):
        raise DataError("there are no documents to split; give at least one")
    copies = Counter(text for text in documents if text)
    sizes = {text: number * len(text.encode()) for text, number in copies.items()}
    cuts = _cuts(copies, sizes, validation_fraction, seed)
    share = _held_bytes(copies, sizes, cuts) / sum(sizes.values())
    if abs(share - validation_fraction) > _TOLERANCE * min(validation_fraction, 1 - validation_fraction):
        logger.warning(
            f"{share:.1%} of the bytes are held out instead of {validation_fraction:.0%}: the documents are too few, "
            "or equal, and too short to be cut"
        )
    parts = [(text[: cuts.get(text)], text[cuts[text] :] if text in cuts else "") for text in documents]
    train = [part for part, held_out in parts if part or not held_out]
    return train, [held_out for _, held_out in parts if held_out]


def _cuts(copies: Counter[str], sizes: dict[str, int], fraction: float, seed: int) -> dict[str, int]:
    """Return the texts that are held out, each with the index of its first character held out: 0 for a whole text.

    Args:
        copies: the number of copies of each text.
        sizes: the bytes of all copies of each text.
        fraction: the share of the bytes to hold out.
        seed: of the order of the texts.
    """
    total = sum(sizes.values())
    smaller_part = min(fraction, 1 - fraction) * total
    # 1. Texts that no part can take whole.
    large = {text for text, size in sizes.items() if size > smaller_part}
    cuts = {text: cut for text in large if (cut := _cut_position(text, 1 - fraction)) is not None}
    wanted = fraction * total - _held_bytes(copies, sizes, cuts)
    # 2. Whole texts. Those that are large and yet too short to be cut come last.
    order = sorted(sizes.keys() - cuts.keys(), key=lambda text: (text in large, _digest(text, seed)))
    sums = list(accumulate((sizes[text] for text in order), initial=0))
    fewest = 0 if cuts else 1  # no part is empty
    counts = range(fewest, len(sums) - fewest)
    if not counts:
        raise DataError(
            f"one document of {len(order[0])} characters is too short to hold out {fraction:.0%} of it; "
            "give more text or several documents"
        )
    count = min(counts, key=lambda number: abs(sums[number] - wanted))
    # 3. The text at which the share is reached.
    last = bisect_right(sums, wanted) - 1
    if abs(sums[count] - wanted) > _TOLERANCE * smaller_part and 0 <= last < len(order):
        cut = _cut_position(order[last], 1 - (wanted - sums[last]) / sizes[order[last]])
        if cut is not None:
            count, cuts[order[last]] = last, cut
    return cuts | dict.fromkeys(order[:count], 0)


def _digest(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()


def _held_bytes(copies: Counter[str], sizes: dict[str, int], cuts: dict[str, int]) -> int:
    """Return the number of bytes that cuts hold out."""
    return sum(copies[text] * len(text[cut:].encode()) if cut else sizes[text] for text, cut in cuts.items())


def _cut_position(text: str, part: float) -> int | None:
    """Return the index of the character at a fraction of a text's bytes, moved to the start of a line that is near.

    None if one side would be blank.
    """
    data = text.encode()
    middle = round(len(data) * part)
    line_starts = (data.rfind(b"\n", 0, middle) + 1, data.find(b"\n", middle) + 1)
    nearest = min(line_starts, key=lambda start: abs(start - middle))
    near = _TOLERANCE / 2 * min(middle, len(data) - middle)
    cut = len(data[: nearest if abs(nearest - middle) <= near else middle].decode(errors="ignore"))
    return cut if text[:cut].strip() and text[cut:].strip() else None
