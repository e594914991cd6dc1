"""metrics.jsonl: one JSON object a line, for every step and every validation."""

import json
import os
from pathlib import Path
from typing import Self, TextIO

from resolvent.files import write_file

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's metrics within a `with` block; each line is in the file as soon as it is written.

    Args:
        run_dir: the run folder.
        last_step: lines beyond this step are dropped first, and so is a final validation, since a resumed run
            writes them again; a last line that was cut off when the run was killed goes with them.
        enabled: whether this process writes; the others of a distributed run do not.
    """

    def __init__(self, run_dir: Path, last_step: int, enabled: bool = True) -> None:
        self._path, self._last_step, self._enabled = run_dir / FILE_NAME, last_step, enabled
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        if self._enabled:
            kept = [line for line in _complete_lines(self._path) if _is_kept(line, self._last_step)]
            write_file(self._path, "".join(kept).encode())
            self._file = open(self._path, "a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, **record: float | bool) -> None:
        """Append a record."""
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Wait until everything written is on disk, so that a checkpoint is never ahead of its metrics."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _is_kept(line: str, last_step: int) -> bool:
    record = json.loads(line)
    return record["step"] <= last_step and not record.get("final", False)
