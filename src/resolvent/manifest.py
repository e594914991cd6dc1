"""manifest.json: size and SHA-256 of a folder's files, to detect damage before a file is used."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from resolvent.errors import CheckpointError
from resolvent.files import check_version, open_regular, read_bytes, read_json, shown, steadily, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
RUN_FILE = "training.json"
"""File of the configuration of a run; with a manifest, it marks a run folder."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Files of a model."""
INDEX = f"{WEIGHTS}.index.json"
"""File that names the file of every weight, where there are several files."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of the low-rank adapters of a model, in the format of PEFT."""


def write_manifest(folder: Path, names: Iterable[str], held: BinaryIO | None = None) -> None:
    """Write the manifest of files in a folder; `held` as of `atomic_file`."""
    files = {name: description(folder / name) for name in sorted(names)}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "files": files}, held)


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Compare files of a folder with its manifest, which must list each of them.

    Raises:
        CheckpointError: names the first file that is missing, changed or not listed; or the manifest is unsound.
    """
    names = list(names)
    steadily(lambda: _check_files(folder, names), *(folder / name for name in (MANIFEST, *names)))


def lists(folder: Path, name: str) -> bool:
    """Return True if the manifest of a folder lists a file.

    Raises:
        CheckpointError: the manifest is missing or unsound.
    """
    return name in steadily(lambda: _read_manifest(folder), folder / MANIFEST)


def read_checked(path: Path, most_bytes: int) -> bytes:
    """Read a file and compare it with the manifest beside it, if there is one.

    Raises:
        CheckpointError: the file has changed, or the manifest is damaged.
        OSError, ValueError: as `read_bytes` does.
    """

    def read() -> bytes:
        content = read_bytes(path, most_bytes)
        if manifest.exists():
            listed = _read_manifest(path.parent)
            if path.name in listed:
                _compare(path, _describe(len(content), hashlib.sha256(content).hexdigest()), listed[path.name])
        return content

    manifest = path.parent / MANIFEST
    return steadily(read, path, manifest)


def _check_files(folder: Path, names: list[str]) -> None:
    listed = _read_manifest(folder)
    for name in names:
        path = folder / name
        if name not in listed:
            raise CheckpointError(f"{folder / MANIFEST} does not list {name}: restore it from a copy")
        try:
            found = description(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}; restore it from a copy") from error
        _compare(path, found, listed[name])


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    record = read_json(path)
    check_version(path, record.get("format_version"), FORMAT_VERSION)
    files = record.get("files")
    if record.keys() != {"format_version", "files"} or not isinstance(files, dict):
        raise CheckpointError(f"{path} is no manifest: it holds {shown(sorted(record))}; restore it from a copy")
    return files


def _compare(path: Path, found: dict[str, Any], expected: object) -> None:
    if found != expected:
        length = isinstance(expected, dict) and expected.get("bytes")
        difference = f"{found['bytes']} bytes, not {shown(length)}" if found["bytes"] != length else "another SHA-256"
        raise CheckpointError(
            f"{path} is not the file that was saved: by {MANIFEST}, it has {difference}; restore it from a copy"
        )


def description(path: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file."""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        return _describe(file.tell(), digest.hexdigest())


def _describe(length: int, digest: str) -> dict[str, Any]:
    """Return the manifest entry of a file."""
    return {"bytes": length, "sha256": digest}


def is_as_described(path: Path, entry: object) -> bool:
    """Return True if a file matches its manifest entry; a file of another size is not read."""
    try:
        return isinstance(entry, dict) and path.stat().st_size == entry.get("bytes") and description(path) == entry
    except OSError:
        return False


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its own SHA-256, for files that change after the manifest is written."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return {**record, "sha256": digest}


def is_sealed(record: dict[str, Any]) -> bool:
    """Return True if a record still has the SHA-256 that `sealed` gave it."""
    return record == sealed({name: value for name, value in record.items() if name != "sha256"})
