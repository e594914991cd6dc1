"""Files and folders that appear whole or not at all, even when the machine stops in between."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resolvent.errors import CheckpointError, VersionError

_MOST_JSON_BYTES = 1 << 20
_MOST_JSON_BRACKETS = 500  # so that no reader of the values runs out of stack, which Python has about 1000 frames of


def partial_name(target: Path) -> Path:
    """The name of a file or folder that is not yet complete."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Fill the folder this yields; it gets the name `target`, which must be free, when the block succeeds."""
    partial = partial_name(target)
    shutil.rmtree(partial, ignore_errors=True)  # what a run that was killed left behind
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    _sync(target.parent)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Write the file this yields; it takes the place of `target` when the block succeeds and it is on disk."""
    partial = partial_name(target)
    try:
        yield partial
        _sync(partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(target.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file, made where missing, as long as the block lasts; the lock follows it when it is renamed.

    Raises:
        CheckpointError: another process holds it, or the folder cannot be written.
    """
    import fcntl  # Windows, where a model can be used at least, does not have it

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot write to {path.parent}: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"the run in {path.parent} is in use by another process: wait for its end, or stop it"
            ) from error
        yield
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, and rename it once it is on disk."""
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named: a pipe or a device as it is, all else as `write_file` does."""
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            file.write(content)
    else:
        write_file(path, content)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as `write_file` does."""
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of up to a megabyte.

    Raises:
        CheckpointError: the file is missing, too large, too deeply nested, cannot be read or holds something else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_JSON_BYTES + 1)
        if len(content) > _MOST_JSON_BYTES:
            raise ValueError(f"it is larger than {_MOST_JSON_BYTES:,} bytes")
        if content.count(b"[") + content.count(b"{") > _MOST_JSON_BRACKETS:
            raise ValueError(f"it has more than {_MOST_JSON_BRACKETS} brackets")
        value = json.loads(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def check_version(path: Path | str, found: object, known: int) -> None:
    """Refuse a file of a format version that this release does not know: it knows all up to ``known``.

    Raises:
        VersionError: the version is a later one.
        CheckpointError: it is none that ever was.
    """
    if type(found) is int and found > known:
        raise VersionError(
            f"{path} has format version {shown(found)}; this release reads up to {known}: a newer one wrote the "
            "file, update resolvent"
        )
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{path} has format version {shown(found)}, which never was: restore it from a copy")


def shown(value: object) -> str:
    """A value for a message: its repr, but not pages of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
