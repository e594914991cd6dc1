"""Tokens on disk: a folder of shards with an index, and how they are read.

`tokens.json`, which carries its own SHA-256, describes the folder: the tokenizer, the source, and for each of the two
streams (`train`, and `held-out` if something is) its sizes and the SHA-256 of its small files:

- `train.starts` and `train.bytes`: (D,) int64, where documents begin in the stream, and the bytes of their texts.
- `train.digests`: the first 16 bytes of the SHA-256 of every `BLOCK_TOKENS` tokens of the stream.
- `train-00000.tokens`, ...: the tokens, uint16 or uint32, or int32 of conversations (see `TokenStream`),
  `shard_tokens` in every file but the last.

The small files are compared with the index when a folder is opened, and the sizes of the shards too. A block of tokens
is compared with its digest when a process reads from it for the first time.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from resolvent.data.folders import TOKENS_FILE
from resolvent.data.stream import TokenStream
from resolvent.data.tokenization import load_tokenizer
from resolvent.errors import CheckpointError, DataError
from resolvent.files import check_version, open_regular, read_json, shown
from resolvent.manifest import is_as_described, is_sealed

FORMAT_VERSION = 1
INDEX = TOKENS_FILE
TRAIN, HELD_OUT = "train", "held-out"
BLOCK_TOKENS = 1 << 15
DIGEST_BYTES = 16


def is_token_folder(path: Path) -> bool:
    """Return True for a folder with shards of tokens."""
    return (path / INDEX).exists()


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a tokenizer's definition."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def block_digest(block: bytes) -> bytes:
    """Return the digest of a block of tokens."""
    return hashlib.sha256(block).digest()[:DIGEST_BYTES]


@dataclass(frozen=True)
class TokenFile:
    """One shard, or the beginning of it.

    Attributes:
        path: of the file.
        dtype: of its tokens.
        length: the number of tokens.
        stored: the number of tokens that the file holds.
        digests: (blocks, `DIGEST_BYTES`) uint8, the digests of its blocks.
    """

    path: Path
    dtype: np.dtype
    length: int
    stored: int
    digests: np.ndarray


class StoredTokens:
    """Tokens in files, end to end, of which slices are read when they are asked for.

    Reading through the operating system, not through a mapping of the files: mapped pages would count as memory of the
    process. What was read stays in the cache of the system.

    Args:
        files: at least one, all of the same type.
    """

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = files
        self.dtype = files[0].dtype
        self._bounds = np.cumsum([0, *(file.length for file in files)])
        self._descriptors: dict[int, int] = {}
        self._checked = [np.zeros(len(file.digests), bool) for file in files]

    def __len__(self) -> int:
        return int(self._bounds[-1])

    @property
    def shape(self) -> tuple[int]:
        """(T,)."""
        return (len(self),)

    def __getitem__(self, index: Any, /) -> Any:
        """Return an array for a slice. Any other index reads all tokens.

        Raises:
            DataError: a shard is not what was written.
        """
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            return self._read(start, max(start, stop))
        if isinstance(index, int | np.integer):
            position = range(len(self))[index]
            return self._read(position, position + 1)[0]
        return self._read(0, len(self))[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(0, len(self)).astype(dtype or self.dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTokens, (self.files,)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _read(self, start: int, stop: int) -> np.ndarray:
        tokens, done = np.empty(stop - start, self.dtype), 0
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while done < len(tokens):
            first = start + done - int(self._bounds[number])
            count = min(len(tokens) - done, self.files[number].length - first)
            self._check(number, first, first + count)
            tokens[done : done + count] = np.frombuffer(self._bytes(number, first, count), self.dtype)
            done, number = done + count, number + 1
        return tokens

    def _check(self, number: int, start: int, stop: int) -> None:
        """Compare the blocks that hold some tokens with their digests, once.

        Raises:
            DataError: a block has changed.
        """
        file, checked = self.files[number], self._checked[number]
        for block in range(start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)):
            if not checked[block]:
                count = min(BLOCK_TOKENS, file.stored - block * BLOCK_TOKENS)
                data = self._bytes(number, block * BLOCK_TOKENS, count)
                if block_digest(data) != file.digests[block].tobytes():
                    raise damaged(file.path, f"tokens from {block * BLOCK_TOKENS:,} on have another SHA-256")
                checked[block] = True

    def _bytes(self, number: int, start: int, count: int) -> bytes:
        file = self.files[number]
        size = file.dtype.itemsize
        try:
            if number not in self._descriptors:
                with open_regular(file.path) as opened:
                    self._descriptors[number] = os.dup(opened.fileno())
            data = os.pread(self._descriptors[number], count * size, start * size)
        except OSError as error:
            raise damaged(file.path, str(error)) from error
        if len(data) < count * size:
            raise damaged(file.path, f"it ends {count * size - len(data):,} bytes too early")
        return data


@dataclass(frozen=True)
class TokenFolder:
    """A folder of shards.

    Attributes:
        path: of the folder.
        streams: the two streams by name; of a text that is not split, `train` alone.
        fingerprint: a hash of every token, those that separate documents included.
        fraction: the share of the bytes that was to be held out; None for nothing.
        warnings: about the text, from when it was read.
    """

    path: Path
    streams: dict[str, TokenStream]
    fingerprint: str
    fraction: float | None
    warnings: list[str]


def open_tokens(folder: Path, tokenizer: Tokenizer) -> TokenFolder:
    """Open a folder of shards.

    Args:
        folder: made by `write_tokens`.
        tokenizer: the one that the tokens must be of.

    Raises:
        DataError: the folder is damaged, of a newer release, or of another tokenizer.
    """
    index = _read_index(folder)
    if index["tokenizer"] != (digest := tokenizer_digest(tokenizer)):
        raise DataError(
            f"{folder} holds tokens of another tokenizer ({index['tokenizer'][:12]}, vocabulary of "
            f"{index['vocab_size']:,}) than the run's ({digest[:12]}, vocabulary of {tokenizer.get_vocab_size():,}): "
            f"train with --tokenizer {folder}, or tokenize the text again"
        )
    for name, entry in index["files"].items():
        if not is_as_described(folder / name, entry):
            raise damaged(folder / name, "it is missing or has changed")
    with _malformed(folder):
        streams = {name: _stream(folder, name, index) for name in index["streams"]}
        return TokenFolder(folder, streams, index["fingerprint"], index["validation_fraction"], index["warnings"])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = read_json(path)
        check_version(path, index.get("format_version"), FORMAT_VERSION)
    except CheckpointError as error:
        raise DataError(f"{error}; {folder} holds no tokens that can be used: {_REMEDY}") from error
    if not is_sealed(index):
        raise damaged(path, "it has another SHA-256")
    return index


_REMEDY = "remove the folder, and the text is tokenized again"


def damaged(path: Path, what: str) -> DataError:
    """Return the error of a file of shards that is not what was written."""
    return DataError(f"{path} is damaged: {what}. Restore {path.parent} from a copy; of a cache, {_REMEDY}")


@contextmanager
def _malformed(folder: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise damaged(folder / INDEX, f"it does not describe shards ({shown(error)})") from error


def shard_name(stream: str, number: int) -> str:
    """Return the name of a shard."""
    return f"{stream}-{number:05d}.tokens"


def _stream(folder: Path, name: str, index: dict[str, Any]) -> TokenStream:
    dtype, tokens, capacity = np.dtype(index["dtype"]), index["streams"][name]["tokens"], index["shard_tokens"]
    digests = np.fromfile(folder / f"{name}.digests", np.uint8).reshape(-1, DIGEST_BYTES)
    files, blocks = [], capacity // BLOCK_TOKENS
    for number in range(-(-tokens // capacity)):
        path, length = folder / shard_name(name, number), min(capacity, tokens - number * capacity)
        found = path.stat().st_size if path.is_file() else 0
        if found != length * dtype.itemsize:
            raise damaged(path, f"it has {found:,} bytes, not {length * dtype.itemsize:,}")
        files.append(TokenFile(path, dtype, length, length, digests[number * blocks : (number + 1) * blocks]))
    return TokenStream(StoredTokens(files), *(_int64(folder / f"{name}.{part}") for part in ("starts", "bytes")))


def _int64(path: Path) -> np.ndarray:
    """Map a file of int64; of its pages only those that are looked at take memory."""
    return np.memmap(path, np.int64, "r")


def stored_documents(folder: Path, name: str) -> list[str]:
    """Return the documents of a stream as text, decoded by the tokenizer of the folder.

    Raises:
        DataError: the folder is damaged, or holds nothing out.
    """
    tokenizer = load_tokenizer(folder)
    found = open_tokens(folder, tokenizer)
    if name not in found.streams:
        raise DataError(f"{folder} holds nothing out: tokenize the text again with --validation-fraction above 0")
    stream = found.streams[name]
    bounds = [*stream.starts.tolist(), stream.num_predictions]
    ids = [stream.tokens[start + 1 : end].tolist() for start, end in pairwise(bounds)]
    return tokenizer.decode_batch(ids, skip_special_tokens=False)


def joined(streams: Iterable[TokenStream]) -> TokenStream:
    """Lay streams of files end to end: the separator that closes one opens the next.

    Raises:
        DataError: their tokens are of several types, so that they cannot be of one tokenizer.
    """
    streams = list(streams)
    if len(streams) == 1:
        return streams[0]
    files: list[TokenFile] = []
    starts, offset = [], 0
    for stream in streams:
        assert isinstance(stream.tokens, StoredTokens)
        files += stream.tokens.files
        starts.append(stream.starts + offset)
        offset += stream.num_predictions
        if stream is not streams[-1]:
            files[-1] = replace(files[-1], length=files[-1].length - 1)
    if len({file.dtype for file in files}) > 1:
        raise DataError("the texts hold tokens of several types: tokenize them with one tokenizer")
    lengths = np.concatenate([stream.byte_lengths for stream in streams])
    return TokenStream(StoredTokens(files), np.concatenate(starts), lengths)
