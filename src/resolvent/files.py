"""Read and write files and folders: whole or not at all, and never through a link that somebody else has made.

Two kinds of names. A name that this library makes inside a folder may be taken by a link already, in a folder from
elsewhere: `atomic_file`, `atomic_directory`, `own_directory` and `locked` never write through it. A path that the user
named may be a link of the user's: `atomic_output` writes its target.
"""

import errno
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from resolvent.errors import CheckpointError, VersionError

T = TypeVar("T")

_MOST_JSON_BYTES = 1 << 20
_MOST_JSON_BRACKETS = 500  # so that no reader of the values runs out of stack, which Python has about 1000 frames of
_MOST_LINE_BYTES = 1 << 16
_MOST_ATTEMPTS = 20

# Windows, where a model can be used at least, has neither.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)

logger = logging.getLogger(__name__)


def partial_name(target: Path) -> Path:
    """The name of a file or folder that is not yet complete."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Fill the folder this yields. It takes the place of `target` when the block succeeds and all is on disk.

    The folder around `target` must be there.
    """
    partial = partial_name(target)
    if os.path.lexists(partial):  # what a run that was killed left behind
        discard(partial)
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        if os.path.lexists(target):
            discard(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    _sync(target.parent)


@contextmanager
def atomic_file(target: Path, held: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Write the file this yields. It takes the place of `target` when the block succeeds and it is on disk.

    A link in the place of `target` is replaced; what it leads to is not touched, see `atomic_output`.

    Args:
        target: a name that this library makes.
        held: the file, if `locked` has opened it under its partial name.
    """
    partial = partial_name(target)
    if held is not None:
        if os.fstat(held.fileno()).st_nlink != 1:
            raise CheckpointError(f"{partial} is one of several names of a file (hard links): remove this name")
        held.truncate(0)
        with _completed(held, partial, target):
            yield held
        return
    partial.unlink(missing_ok=True)  # what a killed process left behind, or a link of somebody else's
    with _create(partial) as file, _completed(file, partial, target):
        yield file


@contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """Write the file this yields to a path that the user named.

    A regular file appears whole or not at all. Of a link, the target is written. A pipe or a device is written to as
    it is.
    """
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            yield file
        return
    target = output_path(path)
    # A name of its own: nothing keeps another process from writing to the same path.
    partial = partial_name(target.with_name(f"{target.name}.{secrets.token_hex(4)}"))
    with _create(partial) as file, _completed(file, partial, target):
        yield file


@contextmanager
def _completed(file: BinaryIO, partial: Path, target: Path) -> Iterator[None]:
    """Give a file its name when the block succeeds and the file is on disk; else remove it."""
    try:
        yield
        file.flush()
        os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def output_path(path: Path) -> Path:
    """Return the file that a path which the user named leads to, through all links; the file may be missing.

    Raises:
        OSError: the links lead back to where they began.
    """
    with suppress(FileNotFoundError):
        path.stat()
    return Path(os.path.realpath(path))


def own_directory(path: Path) -> Path:
    """Return a folder inside a folder of ours, made where missing.

    Raises:
        CheckpointError: its name is taken by a link.
        OSError: it cannot be made, or its name is taken by a file.
    """
    refuse_link(path)
    path.mkdir(exist_ok=True)
    return path


def refuse_link(path: Path) -> None:
    """Check that a name of ours is not taken by a link.

    Raises:
        CheckpointError: it is.
    """
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a link (to {shown(os.readlink(path))}), and a run writes into its own folder only: replace the "
            "link by a copy of what it leads to, or remove it"
        )


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, whose target stays. Nothing to remove is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Rename a folder that is not needed any more to a partial name, and remove it.

    If the process is killed meanwhile, the partial name marks the rest as incomplete. A folder that cannot be removed
    stays, and a warning is logged: nothing depends on the folder. `sweep` tries again.
    """
    away = partial_name(path.with_name(f"{path.name.strip('.')}.{secrets.token_hex(4)}"))
    try:
        path.rename(away)
        remove(away)
    except OSError as error:
        _warn_of_remains(path, error)


def sweep(folder: Path) -> None:
    """Remove what is not complete in a folder of ours; what cannot be removed stays, which a warning says."""
    for path in folder.glob(partial_name(Path("*")).name):
        try:
            remove(path)
        except OSError as error:
            _warn_of_remains(path, error)


def _warn_of_remains(path: Path, error: OSError) -> None:
    logger.warning("Cannot remove %s, which is not needed any more; the next checkpoint tries again: %s", path, error)


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Hold a file, made where missing, as long as the block lasts; the lock follows it when it is renamed.

    Yields:
        The file, for `atomic_file`.

    Raises:
        CheckpointError: another process holds it, the folder cannot be written, or the file is a link.
    """
    import fcntl  # Windows does not have it

    refuse_link(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot write to {path.parent}: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file: remove it")
    with open(descriptor, "r+b") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.fstat(descriptor).st_nlink > 0  # else the process that held it has removed it
        except BlockingIOError:
            free = False
        if not free:
            raise CheckpointError(
                f"the run in {path.parent} is in use by another process: wait for its end, or stop it"
            )
        yield file


def write_file(path: Path, content: bytes, held: BinaryIO | None = None) -> None:
    """Write a file of ours, as `atomic_file` does."""
    with atomic_file(path, held) as file:
        file.write(content)


def write_json(path: Path, value: dict[str, Any], held: BinaryIO | None = None) -> None:
    """Write a JSON object to a file of ours, as `atomic_file` does."""
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), held)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named, as `atomic_output` does."""
    with atomic_output(path) as file:
        file.write(content)


def append_to(path: Path) -> FileIO:
    """Open a file of ours for appending; each write reaches the file at once.

    Raises:
        CheckpointError: the file is a link.
        OSError: it cannot be written.
    """
    refuse_link(path)
    return FileIO(path, "a", opener=lambda name, mode: os.open(name, mode | _NOFOLLOW, 0o666))


def open_regular(path: Path, *, follow_links: bool = True) -> BufferedReader:
    """Open a file for reading, without ever waiting for the other end of a pipe.

    Args:
        path: the file.
        follow_links: whether it may be a link. Files of models may: hubs keep them so.

    Raises:
        CheckpointError: it may not, and is one.
        OSError: the file cannot be read, or is a pipe, a device or a folder.
    """
    if not follow_links:
        refuse_link(path)
    flags = _NONBLOCK if follow_links else _NONBLOCK | _NOFOLLOW
    file = open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))  # noqa: SIM115 (it is returned)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def read_bytes(path: Path, most_bytes: int, *, follow_links: bool = True) -> bytes:
    """Read a file that may have so many bytes.

    Raises:
        ValueError: it has more.
        CheckpointError, OSError: as `open_regular` does.
    """
    content = bytearray()
    with open_regular(path, follow_links=follow_links) as file:
        while part := file.read(1 << 20):
            content += part
            if len(content) > most_bytes:
                raise ValueError(f"it is larger than {most_bytes:,} bytes")
    return bytes(content)


def read_lines(path: Path, *, follow_links: bool = True) -> Iterator[bytes]:
    """Read a file line by line, with their ends.

    Raises:
        ValueError: a line is longer than 64 kB.
        CheckpointError, OSError: as `open_regular` does.
    """
    with open_regular(path, follow_links=follow_links) as file:
        while line := file.readline(_MOST_LINE_BYTES + 1):
            if len(line) > _MOST_LINE_BYTES:
                raise ValueError(f"it has a line of more than {_MOST_LINE_BYTES:,} bytes")
            yield line


def steadily(read: Callable[[], T], *paths: Path) -> T:
    """Call `read` and return its result; call it again if it failed while another process replaced one of the files."""
    for _ in range(_MOST_ATTEMPTS):
        before = [_identity(path) for path in paths]
        try:
            return read()
        except (CheckpointError, OSError, ValueError):
            if [_identity(path) for path in paths] == before:
                raise
    return read()


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return numbers that change when the file is replaced or written; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_json(path: Path, read: Callable[[Path, int], bytes] = read_bytes) -> dict[str, Any]:
    """Read a JSON object of up to a megabyte.

    Args:
        path: the file.
        read: reads it, as `read_bytes` does.

    Raises:
        CheckpointError: the file is missing, too large, too deeply nested, cannot be read or holds something else.
    """
    try:
        content = read(path, _MOST_JSON_BYTES)
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


def _create(path: Path) -> BinaryIO:
    """Make a file under a name that is free, by no means through a link."""
    return open(path, "xb", opener=lambda name, mode: os.open(name, mode | _NOFOLLOW, 0o666))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
