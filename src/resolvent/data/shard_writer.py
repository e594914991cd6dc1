"""Write shards of tokens. If the process is killed, the next one continues from the last saved position."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer

from resolvent.data.encoding import Encoder, batched
from resolvent.data.shards import (
    BLOCK_TOKENS,
    FORMAT_VERSION,
    HELD_OUT,
    INDEX,
    TRAIN,
    block_digest,
    shard_name,
    tokenizer_digest,
)
from resolvent.data.stream import SIGNED
from resolvent.data.text import Fragment, Plan, Text
from resolvent.data.tokenization import save_tokenizer
from resolvent.errors import CheckpointError
from resolvent.files import partial_name, read_json, refuse_link, remove, sync, write_json
from resolvent.manifest import description, is_sealed, sealed

SHARD_TOKENS = 1 << 27
"""Tokens of a shard: 256 MB, or 512 where the vocabulary needs uint32."""
SAVE_TOKENS = 1 << 22
"""Tokens after which the position is saved: a process that is killed loses at most so many."""
_BATCH_CHARACTERS = 1 << 18
_PROCESS_BYTES = 1 << 23
"""Text that is worth starting a process for."""
_PROGRESS = "progress.json"

Advance = Callable[[int], None]


def write_tokens(
    folder: Path, key: str, text: Text, tokenizer: Tokenizer, fraction: float | None, advance: Advance | None = None
) -> None:
    """Tokenize a text into a folder of shards, which appears when it is complete.

    Until then it is the folder's partial name. If the process is killed, the next call with the same key goes on, and
    the result is the same to the byte.

    Args:
        folder: where to; it must not exist, and the folder around it must.
        key: of text, tokenizer and fraction together; partial work of another key is removed.
        text: the text.
        tokenizer: encodes it.
        fraction: the share of the bytes to hold out; None for nothing.
        advance: called with numbers of bytes that were encoded.

    Raises:
        DataError: text that cannot be read, split or encoded.
        OSError: the folder cannot be written.
    """
    work = partial_name(folder)
    refuse_link(work)
    if not _is_complete(work, key):
        plan = text.plan(fraction)
        if _saved_position(work, key) is None:
            remove(work)
            work.mkdir()
        names = (TRAIN,) if fraction is None else (TRAIN, HELD_OUT)
        with Encoder(tokenizer, 0 if text.holds_tokens else _processes(text.num_bytes)) as encoder:
            streams = {name: _StreamWriter(work, name, encoder, signed=text.signed) for name in names}
            _encode(work, key, streams, plan, text.holds_tokens, encoder, advance)
        save_tokenizer(tokenizer, work)
        _write_index(work, key, streams.values(), tokenizer, fraction, plan)
    (work / _PROGRESS).unlink(missing_ok=True)
    sync(work)
    work.rename(folder)
    sync(folder.parent)


def _is_complete(work: Path, key: str) -> bool:
    """Return True if all is written, and the folder has only to get its name."""
    try:
        index = read_json(work / INDEX)
    except CheckpointError:
        return False
    return is_sealed(index) and index.get("key") == key


def _encode(
    work: Path,
    key: str,
    streams: dict[str, "_StreamWriter"],
    plan: Plan,
    encoded: bool,
    encoder: Encoder,
    advance: Advance | None,
) -> None:
    """Append the text to the streams, from the saved position on; it may be `encoded` already."""
    position = _saved_position(work, key) or {"fragments": 0, "streams": {}, "state": None}
    done, state, unsaved = position["fragments"], position["state"], 0
    for name, stream in streams.items():
        stream.go_to(**position["streams"].get(name, {"tokens": 0, "documents": 0}))
    batches = _batches(plan, plan.fragments(cut=encoder.cuts_anywhere, done=done, state=state))
    for (batch, state), ids in batches if encoded else encoder.encode(batches):
        for fragment, part in zip(batch, ids, strict=True):
            unsaved += streams[HELD_OUT if fragment.held_out else TRAIN].add(fragment, part)
        done += len(batch)
        if advance is not None:
            advance(sum(len(fragment.content) for fragment in batch))
        if unsaved >= SAVE_TOKENS:
            _save_position(work, key, done, state, streams)
            unsaved = 0
    _save_position(work, key, done, state, streams)
    for stream in streams.values():
        stream.end()


def _write_index(
    work: Path,
    key: str,
    streams: Iterable["_StreamWriter"],
    tokenizer: Tokenizer,
    fraction: float | None,
    plan: Plan,
) -> None:
    streams = list(streams)
    sizes = {stream.name: int(np.fromfile(work / f"{stream.name}.bytes", np.int64).sum()) for stream in streams}
    warnings = [*plan.warnings, *plan.closing_warnings(sizes.get(HELD_OUT, 0), sum(sizes.values()))]
    index = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "tokenizer": tokenizer_digest(tokenizer),
        "vocab_size": tokenizer.get_vocab_size(),
        "dtype": streams[0].dtype.str,
        "shard_tokens": SHARD_TOKENS,
        "validation_fraction": fraction,
        "streams": {stream.name: stream.sizes for stream in streams},
        "fingerprint": _digest(streams),
        "files": {name: description(work / name) for stream in streams for name in stream.small_files},
        "warnings": warnings,
    }
    write_json(work / INDEX, sealed(index))


def _processes(num_bytes: int | None) -> int:
    """Return the number of processes to encode with: none, in which the library's threads do, for little text."""
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1
    count = cores if num_bytes is None else min(cores, num_bytes // _PROCESS_BYTES)
    return count if count > 1 else 0


def _batches(plan: Plan, fragments: Iterable[Fragment]) -> Iterator[tuple[tuple[list[Fragment], Any], list[Any]]]:
    """Yield batches with the state of reading after them, and their contents."""
    for batch in batched(fragments, lambda fragment: len(fragment.content), _BATCH_CHARACTERS):
        yield (batch, plan.state()), [fragment.content for fragment in batch]


class _StreamWriter:
    """Appends documents to the shards of one stream."""

    def __init__(self, folder: Path, name: str, encoder: Encoder, *, signed: bool) -> None:
        self.folder, self.name, self.signed = folder, name, signed
        self.dtype = SIGNED if signed else encoder.dtype
        self.separator = np.array([~encoder.separator if signed else encoder.separator], self.dtype)
        self.small_files = [f"{name}.starts", f"{name}.bytes", f"{name}.digests"]
        self.tokens, self.documents = 0, 0
        self._files: list[Any] = []

    def go_to(self, tokens: int, documents: int) -> None:
        """Cut off what was written after a position, and open the files there."""
        self.tokens, self.documents = tokens, documents
        number, offset = divmod(tokens, SHARD_TOKENS)
        for path in self.folder.glob(f"{self.name}-*.tokens"):
            if path.name > shard_name(self.name, number):
                path.unlink()
        shard = self._open(shard_name(self.name, number), offset * self.dtype.itemsize)
        self._files = [shard, *(self._open(file, documents * 8) for file in self.small_files[:2])]

    def add(self, fragment: Fragment, ids: np.ndarray) -> int:
        """Append a fragment, and return the number of its tokens."""
        if fragment.part_bytes is not None:
            for file, value in zip(self._files[1:], (self.tokens, fragment.part_bytes), strict=True):
                file.write(np.int64(value).tobytes())
            self.documents += 1
            if not self.signed:
                self._write(self.separator)
        self._write(ids.astype(self.dtype))
        return len(ids)

    def end(self) -> None:
        """Append the last separator, and close the files."""
        self._write(self.separator)
        self.sync()
        for file in self._files:
            file.close()

    def sync(self) -> None:
        """Flush the files to the disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    @property
    def sizes(self) -> dict[str, int]:
        """The position."""
        return {"tokens": self.tokens, "documents": self.documents}

    def _write(self, ids: np.ndarray) -> None:
        while len(ids):
            left = SHARD_TOKENS - self.tokens % SHARD_TOKENS
            part = ids[:left]
            self._files[0].write(part.tobytes())
            self.tokens += len(part)
            ids = ids[len(part) :]
            if len(part) == left:
                self.sync()
                self._files[0].close()
                self._files[0] = self._open(shard_name(self.name, self.tokens // SHARD_TOKENS), 0)

    def _open(self, name: str, size: int) -> Any:
        """Open a file to append to, cut to a size."""
        path = self.folder / name
        refuse_link(path)
        file = open(path, "r+b" if path.exists() else "xb")  # noqa: SIM115  it is kept
        file.truncate(size)
        file.seek(size)
        return file


def _digest(streams: Iterable[_StreamWriter]) -> str:
    """Write the digests of blocks, and return the fingerprint."""
    fingerprint = hashlib.sha256()
    for stream in streams:
        fingerprint.update(f"{stream.dtype.str}{(stream.tokens,)}".encode())
        with open(stream.folder / f"{stream.name}.digests", "wb") as digests:
            for number in range(-(-stream.tokens // SHARD_TOKENS)):
                with open(stream.folder / shard_name(stream.name, number), "rb") as shard:
                    while block := shard.read(BLOCK_TOKENS * stream.dtype.itemsize):
                        fingerprint.update(block)
                        digests.write(block_digest(block))
            digests.flush()
            os.fsync(digests.fileno())
    return fingerprint.hexdigest()


def _save_position(work: Path, key: str, fragments: int, state: Any, streams: dict[str, _StreamWriter]) -> None:
    for stream in streams.values():
        stream.sync()
    sizes = {name: stream.sizes for name, stream in streams.items()}
    write_json(work / _PROGRESS, sealed({"key": key, "fragments": fragments, "state": state, "streams": sizes}))


def _saved_position(work: Path, key: str) -> dict[str, Any] | None:
    """Return where an earlier process came to; None if there is nothing to go on with."""
    try:
        position = read_json(work / _PROGRESS)
    except CheckpointError:
        return None
    return position if is_sealed(position) and position.get("key") == key else None
