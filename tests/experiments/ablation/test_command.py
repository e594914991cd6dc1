"""The command `python -m experiments.ablation`: its tables and JSON, on a trained run that loads quickly."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.ablation.__main__ import main
from experiments.ablation.measures import evaluate_mechanisms
from resolvent.data import encode_documents, load_documents, load_tokenizer
from resolvent.models import load_model
from tests.cli.conftest import Outcome, call

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "format-5"
RUN, TEXT = GOLDEN / "run", GOLDEN / "verses.txt"
OPTIONS = ("--data", TEXT, "--device", "cpu", "--length", 256, "--horizon", 32, "--joined")


@pytest.fixture
def ablation(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command and read what it printed."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ablation", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        code, told = (stop.value.code or 0, "") if not isinstance(stop.value.code, str) else (1, stop.value.code)
        out, err = capfd.readouterr()
        return Outcome(int(code), out, err + told)

    return run


def test_command_prints_tables_and_writes_what_the_library_finds(ablation: Callable[..., Outcome], tmp_path: Path):
    path = tmp_path / "found.json"
    outcome = ablation(RUN, *OPTIONS, "--json", path)
    assert outcome.code == 0, outcome.err
    stream = encode_documents(load_documents(TEXT), load_tokenizer(RUN))
    options = dict(length=256, horizon=32, joined=True)
    found = evaluate_mechanisms(load_model(RUN, "cpu"), stream, load_tokenizer(RUN), **options)
    written = json.loads(path.read_text())
    settings = written.pop("settings")
    assert written == json.loads(json.dumps(found.to_dict()))
    assert settings == options | {
        "sequences": 16,
        "seed": 0,
        "model": str(RUN),
        "data": str(TEXT),
        "held_out": False,
    }
    header, *parts = outcome.out.strip().split("\n\n")
    assert header.startswith(f"{RUN}, {found.sequences} texts: 256 tokens read, the next 32 predicted at ")
    assert found.token_decay and found.half_lives
    rows = [len(found.heads), len(found.half_lives.rows), len(found.token_decay.rows), 5, 10]
    assert [len(part.splitlines()) for part in parts] == [3 + count for count in rows]  # title, headings, and in words
    assert f"Erasing all memories costs {found.erased.mean:+.4f} ± {found.erased.standard_error:.4f} nats" in parts[0]
    most = max(found.heads, key=lambda head: head.cost.mean)
    assert f"head {most.head} of layer {most.layer} costs most, {most.cost.mean:+.4f}" in parts[0]


def test_json_replaces_the_tables(ablation: Callable[..., Outcome]):
    outcome = ablation(RUN, *OPTIONS, "--json", "-")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["horizon"] == 32


def test_command_names_missing_mechanisms(ablation: Callable[..., Outcome], tmp_path: Path):
    lacking = ("snr_enabled=false", "resonance_enabled=false", "adaptive_decay=false", "n_layers=1", "num_heads=1")
    sizes = ("d_model=16", "head_dim=16", "consolidation_interval=64")
    options = [part for field in (*lacking, *sizes) for part in ("--set", field)]
    train = ["train", "--data", TEXT, "--steps", 1, "--seq-len", 64, "--batch-size", 2, "--device", "cpu"]
    assert call(*train, *options, "--out", tmp_path / "plain") == 0
    outcome = ablation(tmp_path / "plain", "--data", TEXT, "--length", 64, "--joined", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip().split("\n\n")[2:] == [
        "The model has a single head: none is slow or fast.",
        "Γ is the same for all tokens (adaptive_decay=False).",
        "The model has no SNR filter (snr_enabled=False).",
        "The model has no resonance (resonance_enabled=False).",
    ]


def test_phase_1_model_is_refused(ablation: Callable[..., Outcome], tmp_path: Path):
    sizes = ("d_model=16", "n_layers=1", "num_heads=2", "ar_ssm_max_rank=4", "htt_rank=4")
    options = [part for size in sizes for part in ("--set", size)]
    train = ["train", "--phase", 1, "--data", TEXT, "--steps", 1, "--seq-len", 64, "--batch-size", 2]
    assert call(*train, *options, "--device", "cpu", "--out", tmp_path / "phase1") == 0
    outcome = ablation(tmp_path / "phase1", *OPTIONS)
    assert outcome.code == 1 and not outcome.out
    assert "Error: mechanisms are those of Phase 2, got a Phase1IntegratedModel" in outcome.err
