import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resolvent.models import load_model
from resolvent.models.phase1 import Phase1IntegratedModel
from resolvent.models.phase2 import Phase2IntegratedModel

from .conftest import call, words

Resolvent = Callable[..., Any]


@pytest.fixture(scope="module")
def phase1_run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("runs") / "phase1"
    sizes = ("d_model=32", "n_layers=2", "num_heads=2", "ar_ssm_max_rank=6", "htt_rank=5")
    options = [part for size in sizes for part in ("--set", size)]
    options += ["--seq-len", "64", "--batch-size", "2", "--device", "cpu", "--steps", "30", "--learning-rate", "1e-2"]
    assert call("train", "--phase", 1, "--data", text_file, "--out", path, *options) == 0
    return path


def test_a_phase_1_run_is_a_run(resolvent: Resolvent, phase1_run: Path, text_file: Path):
    assert isinstance(load_model(phase1_run, device="cpu"), Phase1IntegratedModel)
    score = json.loads(resolvent("evaluate", phase1_run, "--data", text_file, "--json", "-").out)
    assert 0 < score["bits_per_byte"] < 8
    outcome = resolvent("generate", phase1_run, "--prompt", "Rhyme", "--max-new-tokens", 5, "--seed", 1)
    assert outcome.code == 0 and outcome.out.startswith("Rhyme")
    assert resolvent("train", "--resume", phase1_run).code == 0


@pytest.mark.parametrize("options", [[], ["--keep-tensor-train"], ["--set", "head_dim=8"]])
def test_conversion_keeps_the_logits_and_reports_alike_tensors_in_a_row(
    resolvent: Resolvent, phase1_run: Path, tmp_path: Path, text_file: Path, options: list[str], monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = resolvent("convert", phase1_run, tmp_path / "out", *options)
    assert outcome.code == 0, outcome.err
    model, source = load_model(tmp_path / "out", device="cpu"), load_model(phase1_run, device="cpu")
    assert isinstance(model, Phase2IntegratedModel)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Converted from the Phase 1 model `{phase1_run.name}`" in card
    assert (model.config.htt_rank == 5) == ("--keep-tensor-train" in options)
    assert model.config.head_dim == (8 if "head_dim=8" in options else 16)
    ids = torch.randint(0, 257, (1, 200))
    assert (model(ids) - source(ids)).abs().max() <= 1e-5
    for name, _ in model.named_parameters():
        assert re.sub(r"^blocks\.\d+", "blocks.*", name) in outcome.out
    assert "blocks.1" not in outcome.out
    for word in ("copied", "new", "constant of Phase 1", "blocks.*.bk.v_proj.bias"):
        assert word in outcome.out
    scores = [
        json.loads(resolvent("evaluate", d, "--data", text_file, "--json", "-").out)
        for d in (phase1_run, tmp_path / "out")
    ]
    assert scores[0]["bits_per_byte"] == pytest.approx(scores[1]["bits_per_byte"], abs=1e-5)


def test_converted_model_generates_and_trains(resolvent: Resolvent, phase1_run: Path, tmp_path: Path, text_file: Path):
    out, run = tmp_path / "out", tmp_path / "run"
    assert f"Train it further: resolvent train --from {out}" in resolvent("convert", phase1_run, out).out
    written = [resolvent("generate", d, "--prompt", "Rhyme", "--temperature", 0) for d in (phase1_run, out)]
    assert written[0].code == 0 and written[0] == written[1]
    options = ["--data", text_file, "--out", run, "--steps", 30, "--seq-len", 64, "--batch-size", 2, "--device", "cpu"]
    outcome = resolvent("train", "--from", out, *options)
    assert outcome.code == 0, outcome.err
    assert f"Phase 2, from {out}: " in outcome.out
    scores = [json.loads(resolvent("evaluate", d, "--data", text_file, "--json", "-").out) for d in (out, run)]
    assert scores[1]["bits_per_byte"] < scores[0]["bits_per_byte"]
    assert resolvent("generate", run, "--max-new-tokens", 5).code == 0
    assert "is finished: step 30 of 30" in resolvent("train", "--resume", run).out


def test_from_names_all_that_the_saved_model_decides(resolvent: Resolvent, phase1_run: Path, tmp_path: Path):
    given = ["--phase", 2, "--preset", "tiny", "--set", "d_model=16", "--tokenizer", "bytes", "--vocab-size", 300]
    outcome = resolvent("train", "--from", phase1_run, "--out", tmp_path / "run", *given)
    assert outcome.code == 2
    told = " ".join(outcome.err.replace("│", " ").split())
    assert "leave out --phase, --preset, --tokenizer, --vocab-size, --set" in told
    assert not (tmp_path / "run").exists()


def test_conversion_as_json_and_by_seed(resolvent: Resolvent, phase1_run: Path, tmp_path: Path):
    report = json.loads(resolvent("convert", phase1_run, tmp_path / "a", "--json", "-").out)
    assert {tensor["status"] for tensor in report["tensors"]} == {"copied", "new"}
    resolvent("convert", phase1_run, tmp_path / "b")
    resolvent("convert", phase1_run, tmp_path / "c", "--seed", 1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_error_names_a_model_that_cannot_be_converted(
    resolvent: Resolvent, phase1_run: Path, run_dir: Path, tmp_path: Path
):
    outcome = resolvent("convert", run_dir, tmp_path / "out")
    assert outcome.code == 1 and "holds no Phase 1 model" in outcome.err
    outcome = resolvent("convert", phase1_run, run_dir)
    assert outcome.code == 1 and "is not empty" in outcome.err
    outcome = resolvent("convert", phase1_run, tmp_path / "out", "--set", "n_layers=3")
    assert outcome.code == 2 and "n_layers is 3, that of the Phase 1 model 2" in words(outcome.err)
    assert not (tmp_path / "out").exists()


def test_presets_of_both_phases_are_listed(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = resolvent("presets", "--phase", 1).out
    assert all(name in text for name in ("8gb", "max_quality", "max_efficiency"))
    assert "large" in resolvent("presets").out


def test_adapters_are_merged(resolvent: Resolvent, phase1_run: Path, text_file: Path, tmp_path: Path):
    pytest.importorskip("peft")
    adapted, merged = tmp_path / "adapted", tmp_path / "merged"
    options = ("--lora", "r=4,alpha=8", "--data", text_file, "--steps", 3, "--lr", 1e-2, "--batch-size", 2)
    outcome = resolvent("train", "--from", phase1_run, *options, "--seq-len", 64, "--device", "cpu", "--out", adapted)
    assert outcome.code == 0, outcome.err
    assert "of which" in outcome.out and "are trained" in outcome.out
    outcome = resolvent("convert", adapted, merged, "--merge")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Merged ")
    assert not list(merged.glob("adapter*"))
    assert "Merged from the run `adapted`" in (merged / "README.md").read_text()
    assert ", as low-rank adapters (r=4,alpha=8), for 3 steps" in (adapted / "README.md").read_text()
    model, source = load_model(merged, device="cpu"), load_model(phase1_run, device="cpu")
    ids = torch.randint(0, 257, (1, 200))
    torch.testing.assert_close(model(ids), load_model(adapted, device="cpu")(ids))
    assert (model(ids) - source(ids)).abs().max() > 1e-3
    scores = []
    for folder in (adapted, adapted / "checkpoints" / "step-00000003", merged):
        scores.append(resolvent("evaluate", folder, "--data", text_file, "--json", "-").out)
        outcome = resolvent("generate", folder, "--prompt", "Rhyme", "--max-new-tokens", 5, "--seed", 1)
        assert outcome.code == 0 and outcome.out.startswith("Rhyme")
    assert len(set(scores)) == 1


def test_merging_needs_adapters_and_nothing_else(resolvent: Resolvent, phase1_run: Path, tmp_path: Path):
    outcome = resolvent("convert", phase1_run, tmp_path / "out", "--merge")
    assert outcome.code == 1 and "has no adapters to merge" in outcome.err
    outcome = resolvent("convert", phase1_run, tmp_path / "out", "--merge", "--keep-tensor-train")
    assert outcome.code == 2 and "leave out all other options" in words(outcome.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [".", "..", "a/.."])
def test_out_without_a_name_is_refused(resolvent, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    outcome = resolvent("convert", tmp_path, out)
    assert outcome.code == 1 and "OUT must be the name of a folder" in outcome.err
