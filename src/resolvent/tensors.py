"""Named tensors in safetensors files that carry the SHA-256 of what they hold."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resolvent.errors import CheckpointError
from resolvent.files import atomic_file, check_version

FORMAT_VERSION = 1


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors from any device to a file that appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    stored = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        try:
            save_file(stored, partial, metadata=_metadata(stored))
            _sort_metadata(partial)
        except SafetensorError as error:  # the library's name for a full disk
            raise OSError(f"{error}: {path}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors, to the CPU. A file of another library's, without our metadata, is taken as it is.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if metadata.keys() <= {"format"}:
        return tensors
    version = metadata.get("format_version")
    check_version(path, int(version) if version is not None and version.isdecimal() else version, FORMAT_VERSION)
    if metadata != _metadata(tensors):
        raise CheckpointError(f"{path} is damaged: its tensors have another SHA-256 than when they were saved")
    return tensors


def _sort_metadata(path: Path) -> None:
    """Bring the metadata, which the library writes in any order, into one: equal tensors shall make equal files."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def _metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file says of its tensors; `format` is for other libraries."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {"format": "pt", "format_version": str(FORMAT_VERSION), "sha256": digest.hexdigest()}
