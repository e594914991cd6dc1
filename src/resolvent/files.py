"""Read and write files and folders, atomically and never through a foreign link.

There are two kinds of names. A name that this library chooses inside a folder may be a link in a folder from elsewhere:
`atomic_file`, `atomic_directory`, `own_directory` and `locked` never write through it. A path that the user named may
be a link of the user: `atomic_output` writes its target.
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
_MOST_JSON_BRACKETS = 500  # keeps recursive readers of the values within about 1000 frames of Python's stack
_MOST_LINE_BYTES = 1 << 16
_MOST_ATTEMPTS = 20

# Windows has neither; models can be used there, not trained.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)

logger = logging.getLogger(__name__)


def partial_name(target: Path) -> Path:
    """Return the name of a file or folder that is not complete yet."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a folder to fill, which replaces `target` when the block succeeds and all files are on disk.

    The folder around `target` must exist.
    """
    partial = partial_name(target)
    if os.path.lexists(partial):  # remains of a killed run
        discard(partial)
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if os.path.lexists(target):
            discard(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees space on a full disk
        raise
    sync(target.parent)


@contextmanager
def atomic_file(target: Path, held: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write, which replaces `target` when the block succeeds and the file is on disk.

    If `target` is a link, the link is replaced and its target is not changed; see `atomic_output`.

    Args:
        target: a name that this library chooses.
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
    partial.unlink(missing_ok=True)  # remains of a killed process, or a foreign link
    with _create(partial) as file, _completed(file, partial, target):
        yield file


@contextmanager
def atomic_output(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to a path that the user named.

    A regular file is replaced atomically. Through a link, the target is written. A pipe or a device is opened directly.
    """
    if path.exists() and not path.is_file():
        with _named(path), open(path, "wb") as file:
            yield file
        return
    target = output_path(path)
    # A unique name: another process may write to the same path.
    partial = partial_name(target.with_name(f"{target.name}.{secrets.token_hex(4)}"))
    with _create(partial) as file, _completed(file, partial, target):
        yield file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in an error of writing, such as that of a full disk, in which Python leaves the name out."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def _completed(file: BinaryIO, partial: Path, target: Path) -> Iterator[None]:
    """Rename a file to its target when the block succeeds and the file is on disk; otherwise remove it."""
    try:
        with _named(target):
            yield
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(target.parent)


def output_path(path: Path) -> Path:
    """Return the target of a path that the user named, through all links; it may be missing.

    Raises:
        OSError: the links form a circle.
    """
    with suppress(FileNotFoundError):
        path.stat()
    return Path(os.path.realpath(path))


def own_directory(path: Path) -> Path:
    """Make a folder with a name of this library, if missing, and return its path.

    Raises:
        CheckpointError: the name is a link.
        OSError: the folder cannot be made, or the name is a file.
    """
    refuse_link(path)
    path.mkdir(exist_ok=True)
    return path


def refuse_link(path: Path) -> None:
    """Check that a name of this library is not a link.

    Raises:
        CheckpointError: the name is a link.
    """
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a link (to {shown(os.readlink(path))}), and a run writes into its own folder only: replace the "
            "link by a copy of what it leads to, or remove it"
        )


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a link without its target. A missing path is no error."""
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
    """Remove incomplete files and folders from a folder; a warning is logged for those that cannot be removed."""
    for path in folder.glob(partial_name(Path("*")).name):
        try:
            remove(path)
        except OSError as error:
            _warn_of_remains(path, error)


def _warn_of_remains(path: Path, error: OSError) -> None:
    logger.warning("Cannot remove %s, which is not needed any more; the next checkpoint tries again: %s", path, error)


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Lock a file, made if missing, within the block; the lock stays when the file is renamed.

    Yields:
        The file, for `atomic_file`.

    Raises:
        CheckpointError: another process holds the lock, the folder cannot be written, or the file is a link.
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
            free = os.fstat(descriptor).st_nlink > 0  # otherwise the process that held the lock has removed the file
        except BlockingIOError:
            free = False
        if not free:
            raise CheckpointError(
                f"the run in {path.parent} is in use by another process: wait for its end, or stop it"
            )
        yield file


def write_file(path: Path, content: bytes, held: BinaryIO | None = None) -> None:
    """Write a file by `atomic_file`."""
    with atomic_file(path, held) as file:
        file.write(content)


def write_json(path: Path, value: dict[str, Any], held: BinaryIO | None = None) -> None:
    """Write a JSON object to a file by `atomic_file`."""
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), held)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named by `atomic_output`."""
    with atomic_output(path) as file:
        file.write(content)


def append_to(path: Path) -> FileIO:
    """Open a file with a name of this library for appending, without a buffer.

    Raises:
        CheckpointError: the file is a link.
        OSError: it cannot be written.
    """
    refuse_link(path)
    return FileIO(path, "a", opener=lambda name, mode: os.open(name, mode | _NOFOLLOW, 0o666))


def open_regular(path: Path, *, follow_links: bool = True) -> BufferedReader:
    """Open a regular file for reading; a pipe is refused without waiting for its other end.

    Args:
        path: the file.
        follow_links: whether the path may be a link, as files of models in the caches of hubs are.

    Raises:
        CheckpointError: the path is a link and must not be one.
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
    """Read a file of at most `most_bytes` bytes.

    Raises:
        ValueError: the file has more bytes.
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
    """Yield the lines of a file, with their ends.

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
    """Check the format version of a file, which must be between 1 and ``known``.

    Raises:
        VersionError: the version is a later one.
        CheckpointError: the version is no positive integer.
    """
    if type(found) is int and found > known:
        raise VersionError(
            f"{path} has format version {shown(found)}; this release reads up to {known}: a newer one wrote the "
            "file, update resolvent"
        )
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{path} has format version {shown(found)}, which does not exist: restore it from a copy")


def truncated(text: str) -> str:
    """Return a text for a message, truncated after 200 characters."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def shown(value: object) -> str:
    """Return a value for a message: its repr, truncated after 200 characters."""
    return truncated(repr(value))


def _create(path: Path) -> BinaryIO:
    """Create a file under a free name, never through a link."""
    return open(path, "xb", opener=lambda name, mode: os.open(name, mode | _NOFOLLOW, 0o666))


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
