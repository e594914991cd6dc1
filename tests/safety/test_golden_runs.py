"""Runs that earlier releases saved can be used and resumed, and those of a newer one are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resolvent.data import load_tokenizer
from resolvent.errors import CheckpointError, VersionError
from resolvent.files import write_json
from resolvent.manifest import MANIFEST, write_manifest
from resolvent.models import load_model
from resolvent.runs import load_trained
from resolvent.tensors import read_tensors
from resolvent.training import resume
from resolvent.training.checkpoint import find_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
FORMATS = sorted(path.name for path in GOLDEN.iterdir())
READ = [name for name in FORMATS if name >= "format-5"]
"""Formats before had another mixer; the last of them shows how it is refused."""


@pytest.fixture(params=READ)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / "golden"))


def expected(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "expected.json").read_text())


def test_golden_run_is_small():
    for format_ in GOLDEN.iterdir():
        assert sum(path.stat().st_size for path in format_.rglob("*") if path.is_file()) < 200_000


def test_golden_model_keeps_its_outputs(golden: Path):
    model, tokenizer = load_trained(golden / "run", "cpu")
    prompt = expected(golden)["prompt"]
    assert tokenizer.decode(prompt[1:]) == "Verse 3:"
    logits = model(torch.tensor([prompt]))[0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected(golden)["logits"]), rtol=1e-4, atol=1e-5)
    new = model.generate(torch.tensor([prompt]), 20, temperature=0)[0, len(prompt) :]
    assert len(tokenizer.decode(new.tolist())) == 20


REFUSALS = {
    "model": (
        lambda golden: load_model(golden / "run", "cpu"),
        r"config\.json has format version 3, of a Phase 2 model in which .* train the model again",
    ),
    "run": (
        lambda golden: resume(golden / "run", data=str(golden / "verses.txt")),
        r"training\.json has format version 2: the run held out other documents.* --from .*run",
    ),
}


@pytest.mark.parametrize("golden", sorted(set(FORMATS) - set(READ)), indirect=True)
@pytest.mark.parametrize("part", REFUSALS)
def test_earlier_format_is_refused_by_name(golden: Path, part: str):
    before = {path: path.read_bytes() for path in golden.rglob("*") if path.is_file()}
    read, message = REFUSALS[part]
    with pytest.raises(CheckpointError, match=message):
        read(golden)
    assert before == {path: path.read_bytes() for path in golden.rglob("*") if path.is_file()}


@pytest.mark.parametrize("golden", READ, indirect=True)
@pytest.mark.parametrize("from_step", [6, 3])
def test_golden_run_resumes_to_its_result(golden: Path, from_step: int):
    run = golden / "run"
    before = read_tensors(run / "model.safetensors")
    if from_step == 3:
        shutil.rmtree(run / "checkpoints" / "step-00000006")
    result = resume(run, data=str(golden / "verses.txt"))
    assert result.validation.loss == pytest.approx(expected(golden)["validation_loss"], rel=1e-4)
    assert find_checkpoint(run)[0] == run / "checkpoints" / "step-00000006"
    for name, tensor in read_tensors(run / "model.safetensors").items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-3, atol=1e-4, msg=name)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    write_json(path, values)


def seal(folder: Path) -> None:
    """Let the folder's manifest describe what it lists as it is now."""
    write_manifest(folder, json.loads((folder / MANIFEST).read_text())["files"])


READERS = {
    "config.json": lambda run, data: load_model(run, device="cpu"),
    "manifest.json": lambda run, data: load_tokenizer(run),
    "training.json": lambda run, data: resume(run, data=data),
    "checkpoints/step-00000006/config.json": lambda run, data: resume(run, data=data),
    "checkpoints/step-00000006/trainer.json": lambda run, data: resume(run, data=data),
    "checkpoints/step-00000006/manifest.json": lambda run, data: resume(run, data=data),
}


@pytest.mark.parametrize("name", READERS)
def test_a_newer_format_is_refused(tmp_path: Path, name: str):
    run = Path(shutil.copytree(GOLDEN / FORMATS[-1] / "run", tmp_path / "run"))
    path = run / name
    newer = json.loads(path.read_text())["format_version"] + 1
    edit(path, lambda values: values.update(format_version=newer))
    if path.name != MANIFEST:
        seal(path.parent)
    files = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(VersionError, match=rf"{path.name} has format version {newer}; .* update resolvent"):
        READERS[name](run, str(GOLDEN / FORMATS[-1] / "verses.txt"))
    assert files == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_tensors_of_a_newer_format_are_refused(tmp_path: Path):
    run = GOLDEN / FORMATS[-1] / "run"
    path = tmp_path / "model.safetensors"
    old = (run / "model.safetensors").read_bytes()
    path.write_bytes(old.replace(b'"format_version":"1"', b'"format_version":"2"'))
    with pytest.raises(VersionError, match="format version 2"):
        read_tensors(path)


def test_missing_format_version_is_refused(tmp_path: Path):
    run = Path(shutil.copytree(GOLDEN / FORMATS[-1] / "run", tmp_path / "run"))
    edit(run / "training.json", lambda values: values.pop("format_version"))
    seal(run)
    with pytest.raises(CheckpointError, match=r"training\.json has format version None"):
        resume(run)
