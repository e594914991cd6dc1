"""Named tensors in safetensors files with a SHA-256 of the tensors."""

import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from resolvent.errors import CheckpointError
from resolvent.files import atomic_file, check_version, open_regular, read_json, shown

FORMAT_VERSION = 1

_MOST_HEADER_BYTES = 1 << 25
"""Size of the names, shapes and offsets of 200,000 tensors."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors from any device to a file, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    stored = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    # Not `save_file` of safetensors: its temporary file has a random name, and stays if the run is killed.
    content = memoryview(save(stored, metadata=_metadata(stored)))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:end]))
    # The library writes metadata in any order; equal tensors must give equal files.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    sorted_header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    with atomic_file(path) as file:
        for part in (content[:8], sorted_header, content[end:]):
            file.write(part)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors to the CPU. A file without the metadata of this library is not checked.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format version.
    """
    with TensorFile(path) as file:
        return file.read()


def indexed_files(index: Path) -> list[Path]:
    """Return the safetensors files of a model that is in several files, which an index beside them names.

    Raises:
        CheckpointError: the index cannot be read, or names no file or one elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    strange = [x for x in names if not isinstance(x, str) or Path(x).name != x or not x.endswith(".safetensors")]
    if strange or not names:
        raise CheckpointError(f"{index} must name files beside it in weight_map, got {shown(strange or weight_map)}")
    return [index.parent / name for name in sorted(set(names))]


class TensorFile:
    """Safetensors file within a `with` block.

    Names, metadata and tensors are those of one file, even if another process replaces the file meanwhile.

    Attributes:
        shapes: shapes of the tensors, by name, from the header.

    Raises:
        CheckpointError: the file is missing, or its header is damaged or longer than 32 MiB.
    """

    shapes: dict[str, torch.Size]

    def __init__(self, path: Path) -> None:
        self._path, self._stack = path, ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            try:
                file = self._stack.enter_context(open_regular(self._path))
                length = int.from_bytes(file.read(8), "little")
                if length > _MOST_HEADER_BYTES:
                    raise SafetensorError(f"its header has {length:,} bytes, more than {_MOST_HEADER_BYTES:,}")
                # The library opens the file by name, twice. On Windows, an open file cannot be replaced.
                name = str(self._path) if sys.platform == "win32" else f"/dev/fd/{file.fileno()}"
                self._tensors: Any = self._stack.enter_context(safe_open(name, framework="pt"))
                self.shapes = {name: torch.Size(self._tensors.get_slice(name).get_shape()) for name in self._names()}
            except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError if memory is short
                raise CheckpointError(f"cannot read {self._path}: {error}") from error
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self) -> dict[str, Tensor]:
        """Return all tensors, on the CPU.

        Raises:
            CheckpointError: they are damaged, or of another format version.
        """
        try:
            metadata = self._tensors.metadata() or {}
            tensors = {name: self._tensors.get_tensor(name) for name in self._names()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self._path}: {error}") from error
        if metadata.keys() <= {"format"}:
            return tensors
        version = metadata.get("format_version")
        is_number = version is not None and version.isdecimal() and len(version) < 10
        found = int(version) if is_number else version
        check_version(self._path, found, FORMAT_VERSION)
        if metadata != _metadata(tensors):
            raise CheckpointError(
                f"{self._path} is damaged: its tensors have another SHA-256 than when they were saved"
            )
        return tensors

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU, which is not checked.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            return self._tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self._path}: {error}") from error

    def _names(self) -> list[str]:
        return list(self._tensors.keys())


def _metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a file; `format` is for other libraries."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {"format": "pt", "format_version": str(FORMAT_VERSION), "sha256": digest.hexdigest()}
