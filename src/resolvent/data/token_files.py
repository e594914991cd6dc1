"""Tokens that other programs have written: Megatron's `.bin` with `.idx`, and nanoGPT's `.bin` of uint16.

They are read as a text is, document by document, and split and copied into shards. Documents are what stands between
separators; in Megatron's files, also between the bounds of the index.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders

from resolvent.data.corpus import EOT
from resolvent.data.reading import Reading
from resolvent.data.split import DocumentKey
from resolvent.data.text import Fragment, Text
from resolvent.data.tokenization import byte_lengths
from resolvent.errors import DataError

_MAGIC = b"MMIDIDX\0\0"
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Types of tokens by their number in an index; those of floats are left out."""
_PIECE_TOKENS = 1 << 16


def is_token_file(path: Path) -> bool:
    """Return True for a file that is named as those of tokens are: `.bin`, or the `.idx` beside it."""
    return path.suffix in (".bin", ".idx") and path.with_suffix(".bin").is_file()


class TokenText(Text):
    """A file of tokens, in the place of a text.

    Args:
        path: of the `.bin`, or of the `.idx` beside it.
        tokenizer: the one that the tokens are of, byte-level.

    Raises:
        DataError: a tokenizer that does not tell how many bytes its tokens stand for, or a damaged file.
    """

    holds_tokens = True

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        super().__init__([str(path)])
        self._path, self._index = path.with_suffix(".bin"), path.with_suffix(".idx")
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise DataError(f"{path} holds tokens, whose bytes only a byte-level tokenizer tells: name one, as gpt2")
        self._separator = tokenizer.token_to_id(EOT)
        self._bytes_of = byte_lengths(tokenizer)
        try:
            self._tokens, self._bounds = self._read_megatron() if self._index.is_file() else self._read_plain()
        except (OSError, ValueError, struct.error) as error:
            raise DataError(f"cannot read the tokens in {path}: {error}; write the file again") from error

    def files(self) -> list[Path]:
        """Return the `.bin` and, of Megatron's, the `.idx`."""
        return [self._path, self._index] if self._index.is_file() else [self._path]

    def _check(self, path: Path) -> None:
        """Take any file."""

    def _read_plain(self) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.memmap(self._path, np.uint16, "r")
        return tokens, np.array([0, len(tokens)])

    def _read_megatron(self) -> tuple[np.ndarray, np.ndarray]:
        with open(self._index, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError(f"{self._index.name} is no index of Megatron's")
            version, kind, sequences, documents = struct.unpack("<QBQQ", file.read(25))
            if version != 1 or kind not in _TYPES:
                raise ValueError(f"an index of version {version} with tokens of type {kind}")
            lengths = np.fromfile(file, np.int32, sequences).astype(np.int64)
            np.fromfile(file, np.int64, sequences)  # positions in bytes, which follow from the lengths
            bounds = np.concatenate([[0], np.cumsum(lengths)])[np.fromfile(file, np.int64, documents)]
        tokens = np.memmap(self._path, _TYPES[kind], "r")
        if not len(bounds) or bounds[-1] != len(tokens):
            raise ValueError(f"it has {len(tokens):,} tokens, and its index {lengths.sum():,}")
        return tokens, bounds

    def _documents(self) -> Iterator[Iterator[np.ndarray]]:
        """Yield the tokens of each document, piece by piece, without separators."""
        for start, stop in self._spans():
            yield (self._piece(at, min(stop, at + _PIECE_TOKENS)) for at in range(start, stop, _PIECE_TOKENS))

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Yield the first token of each document, and the one after the last."""
        for low, high in zip(self._bounds[:-1].tolist(), self._bounds[1:].tolist(), strict=True):
            start = low
            for at in range(low, high, _PIECE_TOKENS):
                for found in np.flatnonzero(
                    self._tokens[at : min(high, at + _PIECE_TOKENS)] == self._separator
                ).tolist():
                    if at + found > start:
                        yield start, at + found
                    start = at + found + 1
            if high > start:
                yield start, high

    def _piece(self, start: int, stop: int) -> np.ndarray:
        ids = self._tokens[start:stop].astype(np.int64)
        if ids.min() < 0 or ids.max() >= len(self._bytes_of):
            raise DataError(
                f"{self._path} holds the token {ids.max() if ids.min() >= 0 else ids.min()}, and the tokenizer has "
                f"{len(self._bytes_of):,}: name the tokenizer of its tokens with --tokenizer"
            )
        return ids

    def _keys_and_sizes(self, reading: Reading) -> Iterator[tuple[int, int]]:
        for document in self._documents():
            key, size = DocumentKey(), 0
            for ids in document:
                key.update(ids.tobytes())
                size += int(self._bytes_of[ids].sum())
            yield key.value(), size

    def _cut(self, parts: Mapping[int, float]) -> dict[int, int | None]:
        """Cut documents between two tokens."""
        cuts: dict[int, int | None] = {}
        for number, document in enumerate(self._documents() if parts else ()):
            if number in parts:
                size = int(self.survey.sizes[number])
                wanted, read = round(size * parts[number]), 0
                for ids in document:
                    ends = read + np.cumsum(self._bytes_of[ids])
                    if ends[-1] >= wanted:
                        read = int(ends[np.searchsorted(ends, wanted)])
                        break
                    read = int(ends[-1])
                cuts[number] = read if 0 < read < size else None
        return cuts

    def fragments(self, held: np.ndarray, *, cut: bool = True) -> Iterator[Fragment]:
        """Yield the tokens, each piece on its side of the split."""
        for document, first_held, size in zip(
            self._documents(), held.tolist(), self.survey.sizes.tolist(), strict=True
        ):
            read = 0
            for ids in document:
                ends = read + np.cumsum(self._bytes_of[ids])
                trained = int(np.searchsorted(ends, first_held, side="right"))
                if trained:
                    yield Fragment(False, first_held if read == 0 else None, ids[:trained])
                if trained < len(ids):
                    opens = read <= first_held
                    yield Fragment(True, size - first_held if opens else None, ids[trained:])
                read = int(ends[-1])
