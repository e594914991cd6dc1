"""Named tensors in safetensors files that carry the SHA-256 of what they hold."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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
    # Not the library's `save_file`, whose temporary file has another name each time and stays when a run is killed.
    content = memoryview(save(stored, metadata=_metadata(stored)))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:end]))
    # The library writes metadata in any order; equal tensors shall make equal files.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    sorted_header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    with atomic_file(path) as partial, open(partial, "wb") as file:
        for part in (content[:8], sorted_header, content[end:]):
            file.write(part)


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


def _metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What a file says of its tensors; `format` is for other libraries."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {"format": "pt", "format_version": str(FORMAT_VERSION), "sha256": digest.hexdigest()}
