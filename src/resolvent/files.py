"""Files and folders that appear whole or not at all, even when the machine stops in between."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resolvent.errors import CheckpointError


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Fill the folder this yields; it gets the name `target`, which must be free, when the block succeeds."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a run that was killed left behind
    partial.mkdir(parents=True)
    yield partial
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    partial.rename(target)
    _sync(target.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, and rename it once it is on disk."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    _sync(partial)
    partial.replace(path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as `write_file` does."""
    write_file(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
