import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resolvent.data import encode_documents, load_documents, load_tokenizer
from resolvent.evaluation import evaluate_mechanisms
from resolvent.models import load_model

Resolvent = Callable[..., Any]


def test_mechanisms_prints_its_tables_and_writes_what_the_library_finds(
    resolvent: Resolvent, run_dir: Path, text_file: Path, tmp_path: Path
):
    path = tmp_path / "found.json"
    arguments = ["--data", text_file, "--device", "cpu", "--length", 64, "--horizon", 32, "--joined", "--json", path]
    outcome = resolvent("evaluate", "mechanisms", run_dir, *arguments)
    assert outcome.code == 0, outcome.err
    stream = encode_documents(load_documents(text_file), load_tokenizer(run_dir))
    options = dict(length=64, horizon=32, joined=True)
    found = evaluate_mechanisms(load_model(run_dir, "cpu"), stream, load_tokenizer(run_dir), **options)
    written = json.loads(path.read_text())
    settings = written.pop("settings")
    assert written == json.loads(json.dumps(found.to_dict()))
    assert settings == options | {
        "sequences": 16,
        "seed": 0,
        "model": str(run_dir),
        "data": str(text_file),
        "held_out": False,
    }
    header, *parts = outcome.out.strip().split("\n\n")
    assert header.startswith(f"{run_dir}, {found.sequences} texts: 64 tokens read, the next 32 predicted at ")
    assert found.token_decay and found.half_lives
    rows = [len(found.heads), len(found.half_lives.rows), len(found.token_decay.rows), 5, 10]
    assert [len(part.splitlines()) for part in parts] == [3 + count for count in rows]  # title, headings, and in words
    assert f"Erasing all memories costs {found.erased.mean:+.4f} ± {found.erased.standard_error:.4f} nats" in parts[0]
    most = max(found.heads, key=lambda head: head.cost.mean)
    assert f"head {most.head} of layer {most.layer} is missed most, by {most.cost.mean:+.4f}" in parts[0]


def test_mechanisms_says_what_a_model_has_not(resolvent: Resolvent, tmp_path: Path, text_file: Path, small: list[str]):
    lacking = ("snr_enabled=false", "resonance_enabled=false", "adaptive_decay=false", "n_layers=1", "num_heads=1")
    options = [part for field in lacking for part in ("--set", field)]
    train = ["train", "--data", text_file, "--steps", 1]
    assert resolvent(*train, *small, *options, "--out", tmp_path / "plain").code == 0
    arguments = ["--data", text_file, "--length", 64, "--joined", "--device", "cpu"]
    outcome = resolvent("evaluate", "mechanisms", tmp_path / "plain", *arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip().split("\n\n")[2:] == [
        "The model has a single head: none is slow or fast.",
        "Γ is the same for all tokens (adaptive_decay=False).",
        "The model has no SNR filter (snr_enabled=False).",
        "The model has no resonance (resonance_enabled=False).",
    ]
    sizes = ["--set", "d_model=32", "--set", "n_layers=1", "--seq-len", 64, "--batch-size", 2, "--device", "cpu"]
    assert resolvent(*train, "--phase", 1, *sizes, "--out", tmp_path / "phase1").code == 0
    outcome = resolvent("evaluate", "mechanisms", tmp_path / "phase1", *arguments)
    assert outcome.code == 1
    assert "Phase1IntegratedModel, which has neither Γ nor a memory" in outcome.err
    assert not outcome.out
