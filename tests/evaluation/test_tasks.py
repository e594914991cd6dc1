"""Tasks of lm-evaluation-harness on a saved model."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch

from resolvent import ConfigError, load_model, save_model
from resolvent.data import save_tokenizer
from resolvent.data.tokenization import bytes_tokenizer
from resolvent.evaluation.tasks import evaluate_tasks

from ..cli.conftest import call
from ..models.small import PHASE2

QUESTIONS = [
    ("The sky is", ["blue", "loud"], 0),
    ("Grass is", ["fast", "green"], 1),
    ("Snow is", ["white", "sharp"], 1),
    ("Coal is", ["wet", "black"], 0),
]
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer, and a task."""
    save_tokenizer(bytes_tokenizer(), tmp_path / "run")
    save_model(PHASE2.model(vocab_size=257), tmp_path / "run")
    path = tmp_path / "tasks" / "colours.jsonl"
    path.parent.mkdir()
    rows = [dict(question=question, choices=choices, answer=answer) for question, choices, answer in QUESTIONS]
    path.write_text("\n".join(map(json.dumps, rows)))
    (path.parent / "colours.yaml").write_text(TASK.format(path=path))
    return tmp_path


def test_error_names_the_missing_package_or_task(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'resolvent\[eval\]'"):
        evaluate_tasks(folder / "run", folder / "run", ["colours"])


def test_a_model_that_a_folder_names_is_not_loaded(folder):
    (folder / "run" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/theirs"}')
    with pytest.raises(ConfigError, match=r"adapter_config\.json may name another model .* --merge"):
        evaluate_tasks(folder / "run", folder / "run", ["colours"])


def test_text_and_tasks_exclude_each_other(folder, capfd):
    assert call("evaluate", folder / "run", "--tasks", "colours", "--data", folder / "text") == 2
    assert "not both" in capfd.readouterr().err
    assert call("evaluate", folder / "run", "--task-path", folder / "tasks") == 2
    assert "name them with --tasks" in capfd.readouterr().err


@pytest.mark.slow
def test_harness_likelihoods_equal_those_of_the_model(folder, monkeypatch, capfd):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'resolvent[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    model, right = load_model(folder / "run", "cpu"), 0
    for question, choices, answer in QUESTIONS:
        nats = []
        for choice in choices:
            ids = torch.tensor([list(f"{question} {choice}".encode())])
            log_probability = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
            nats.append(-log_probability[0, -len(choice) - 1 :].sum().item())
        right += nats[answer] == min(nats)
    with pytest.raises(ConfigError, match="unknown task: flavours"):
        evaluate_tasks(folder / "run", folder / "run", ["flavours"], task_path=folder / "tasks")
    arguments = ("--tasks", "colours", "--task-path", folder / "tasks", "--device", "cpu")
    assert call("evaluate", folder / "run", *arguments, "--json", "-") == 0
    measured = json.loads(capfd.readouterr().out.splitlines()[-1])["colours"]["acc,none"]
    assert math.isclose(measured, right / len(QUESTIONS))
    # The harness's own command, which has to be told of the models.
    command = "import resolvent.hf, lm_eval.__main__ as harness; harness.cli_evaluate()"
    options = ["--model", "hf", "--model_args", f"pretrained={folder / 'run'}", "--tasks", "colours", "--device", "cpu"]
    shown = subprocess.run(
        [sys.executable, "-c", command, "run", *options, "--include_path", str(folder / "tasks")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    row = re.search(r"\|acc\s*\|.\s*\|\s*([\d.]+)", shown)
    assert row is not None and float(row[1]) == pytest.approx(measured, abs=1e-4), shown
