"""metrics.jsonl: one JSON object a line, for every step and every validation."""

import hashlib
import json
import os
from io import FileIO
from pathlib import Path
from typing import Self

from resolvent.errors import CheckpointError
from resolvent.files import write_file

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's metrics within a `with` block; each line is in the file as soon as it is written.

    Args:
        run_dir: the run folder.
        last_step: lines beyond this step are dropped first, and so is a final validation, since a resumed run
            writes them again; a last line that was cut off when the run was killed goes with them.
        enabled: whether this process writes; the others of a distributed run do not.
        sha256: of the lines that are kept, where it is known.

    Raises:
        CheckpointError: the lines that were there are not the run's.
        OSError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, last_step: int, enabled: bool = True, sha256: str | None = None) -> None:
        self._path, self._last_step, self._enabled, self._expected = run_dir / FILE_NAME, last_step, enabled, sha256
        self._digest = hashlib.sha256()
        self._file: FileIO | None = None

    @property
    def exists(self) -> bool:
        """Whether there is a file to go on with."""
        return self._path.exists()

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def go_back(self, last_step: int) -> None:
        """Drop the lines beyond a step."""
        if self._file is not None:
            self._file.close()
        self._last_step, self._expected = last_step, None
        self._open()

    def write(self, **record: float | str) -> None:
        """Append a record."""
        if self._file is None:
            return
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        self._digest.update(line)
        while line:  # a disk that is almost full takes a part
            line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Wait until everything written is on disk, so that a checkpoint is never ahead of its metrics."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _open(self) -> None:
        if not self._enabled:
            return
        kept = b"".join(self._kept_lines())
        self._digest = hashlib.sha256(kept)
        if self._expected not in (None, self.sha256):
            raise CheckpointError(
                f"{self._path} is not what the run wrote up to step {self._last_step}: restore it from a copy, or "
                "remove it to go on without its lines"
            )
        write_file(self._path, kept)
        self._file = FileIO(self._path, "a")

    def _kept_lines(self) -> list[bytes]:
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().splitlines(keepends=True)
        try:
            return [line for line in lines if line.endswith(b"\n") and _is_kept(line, self._last_step)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self._path} holds a line that is no record: restore it from a copy, or remove it to go on without "
                "its lines"
            ) from error


def _is_kept(line: bytes, last_step: int) -> bool:
    record = json.loads(line)
    return record["step"] <= last_step and not record.get("final", False)
