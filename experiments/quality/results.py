"""Runs as lines of JSON in a file that grows: what it holds is not run again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""A run: ``settings``, ``model``, ``learning_rate`` and ``seed``, and what was found.

Records of ``history.jsonl`` are of models with older defaults; ``from`` names the file that held each of them.
"""


def read(paths: Iterable[Path]) -> list[Record]:
    """Read the runs of files. A missing file has none; an incomplete last line is left out."""
    lines = [line for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines(True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path: Path, record: Record) -> None:
    """Add a run, whole; what an interruption cut off before it is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def key(record: Record) -> tuple[str, str, str, int]:
    """Return the identity of a run."""
    return setting(record), record["model"], f"{record['learning_rate']:.3g}", record["seed"]


_MEASURING = {"evaluations", "extrapolate"}
"""Settings that say what is measured and change no training."""


def setting(record: Record) -> str:
    """Return what runs must have in common to be compared: settings and, in `history.jsonl`, the file of origin."""
    training = {name: value for name, value in record["settings"].items() if name not in _MEASURING}
    return json.dumps([record.get("from"), training], sort_keys=True)


def best_learning_rate(records: Iterable[Record], score: str, smallest: bool) -> float | None:
    """Return the learning rate with the best mean score; rates with a run that is not finite come last.

    Args:
        records: runs of one model under the same settings.
        score: the name of what is compared.
        smallest: whether a lower score is better.
    """
    by_rate: dict[float, list[Record]] = {}
    for record in records:
        by_rate.setdefault(record["learning_rate"], []).append(record)

    def rank(rate: float) -> tuple[bool, float]:
        runs = by_rate[rate]
        if not all(run["finite"] for run in runs):
            return True, 0.0
        mean = sum(run[score] for run in runs) / len(runs)
        return False, mean if smallest else -mean

    return min(by_rate, key=rank, default=None)
