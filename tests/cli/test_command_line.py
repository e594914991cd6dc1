import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from resolvent import __version__, training
from resolvent.data import load_documents
from resolvent.models import load_model
from resolvent.models.phase2 import get_phase2_preset
from resolvent.models.phases import PHASES
from resolvent.training import TrainingConfig
from resolvent.training.run_folder import read_run

Resolvent = Callable[..., Any]


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(resolvent: Resolvent, option: str):
    assert resolvent(option) == (0, f"resolvent {__version__}\n", "")


@pytest.mark.parametrize(
    "command", ["train", "generate", "chat", "serve", "evaluate", "convert", "presets", "benchmark"]
)
def test_help_teaches_by_an_example(resolvent: Resolvent, command: str):
    outcome = resolvent(command, "--help")
    assert outcome.code == 0
    assert f"Example: resolvent {command}" in outcome.out


def test_help_lists_the_commands(resolvent: Resolvent):
    text = resolvent("--help").out
    commands = ("train", "generate", "chat", "serve", "evaluate", "convert", "presets", "benchmark")
    assert all(command in text for command in commands)


def test_help_does_not_wait_for_torch():
    code = "import sys, resolvent.cli.app; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "resolvent", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"resolvent {__version__}\n"


def test_every_setting_is_an_option(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = resolvent("train", "--help").out
    for field in dataclasses.fields(TrainingConfig):
        if field.name != "model":
            names = [field.metadata.get("option", "--" + field.name.replace("_", "-"))]
            names += field.metadata.get("aliases", ())
            names += ["--no-compile"] if field.name == "compile" else []
            assert f"{','.join(names)} " in text, field.name


def test_options_reach_the_run(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    options = {
        "steps": 2,
        "seed": 5,
        "precision": "bf16",
        "accumulation": 2,
        "learning-rate": 0.003,
        "schedule": "wsd",
        "warmup-steps": 1,
        "weight-decay": 0.2,
        "beta2": 0.9,
        "keep-checkpoints": 1,
        "tokenizer": "bpe",
        "vocab-size": 270,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    outcome = resolvent("train", "--data", text_file, "--out", tmp_path / "run", *arguments, *small)
    assert outcome.code == 0, outcome.err
    config, _ = read_run(tmp_path / "run")
    for name, value in options.items():
        assert getattr(config, name.replace("-", "_")) == value, name
    model = load_model(tmp_path / "run", device="cpu")
    assert (model.d_model, model.n_layers, model.vocab_size) == (32, 2, 270)


def test_tokens_to_learn_are_for_bpe_alone(resolvent: Resolvent, text_file: Path, tmp_path: Path):
    outcome = resolvent("train", "--data", text_file, "--out", tmp_path / "run", "--vocab-size", 500)
    assert outcome.code == 2 and not (tmp_path / "run").exists()
    assert "bytes has tokens of its own; leave out --vocab-size" in " ".join(outcome.err.replace("│", "").split())


def test_train_prints_settings_and_the_next_command(
    resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path
):
    outcome = resolvent("train", "--data", text_file, "--out", tmp_path / "run", "--steps", 3, *small)
    assert outcome.code == 0
    for part in (
        "parameters, fp32 on cpu",
        "in 6 documents to learn from",
        "documents (",
        "% of the bytes)",
        "step 3/3",
        "validation: loss",
    ):
        assert part in outcome.out
    assert outcome.out.splitlines()[-1].startswith(f"Generate text: resolvent generate {tmp_path / 'run'}")


def test_a_checkpoint_can_be_used_like_its_run(resolvent: Resolvent, run_dir: Path, text_file: Path):
    checkpoint = run_dir / "checkpoints" / "step-00000150"
    for arguments in (["evaluate", "--data", text_file, "--json", "-"], ["generate", "--seed", 1, "--prompt", "Rhyme"]):
        command, *options = arguments
        assert resolvent(command, checkpoint, *options) == resolvent(command, run_dir, *options)


def test_presets_are_counted(resolvent: Resolvent):
    text = resolvent("presets").out
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    assert {"tiny", "small", "base", "large"} <= rows.keys()
    assert float(rows["base"][1].rstrip("M")) == pytest.approx(70.95, rel=0.02)
    assert rows["base"][3:] == ["50,257", "512", "6", "8", "1,024", "8"]
    written = json.loads(resolvent("presets", "--json", "-").out)["presets"]
    for name, preset in written.items():
        counts = preset["parameters"], preset["non_embedding_parameters"]
        assert rows[name][1:3] == [f"{count / 1e6:.1f}M" for count in counts]
    base = get_phase2_preset("base")
    assert (
        written["base"]["non_embedding_parameters"]
        == written["base"]["parameters"] - 2 * base.vocab_size * base.d_model
    )
    assert all(preset["config"] == get_phase2_preset(name).to_dict() for name, preset in written.items())


def test_the_result_of_training_is_that_of_its_run(
    resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path
):
    run = tmp_path / "run"
    outcome = resolvent("train", "--data", text_file, "--out", run, "--steps", 1, *small, "--json", "-")
    result = json.loads(outcome.out)
    assert "step 1/1" in outcome.err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["validation"]["loss"] == last["validation_loss"]
    assert result["validation"]["bits_per_byte"] == last["validation_bits_per_byte"]
    assert result["run_dir"] == str(run)
    assert result["parameters"] == load_model(run, "cpu").num_parameters()


def test_resume_goes_on_with_a_run(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    run = tmp_path / "run"
    resolvent("train", "--data", text_file, "--out", run, "--steps", 3, *small)
    outcome = resolvent("train", "--resume", run, "--steps", 5)
    assert outcome.code == 0
    assert "5 instead of 3: the cosine schedule is stretched to them" in outcome.out
    assert "from step 3 of 5" in outcome.out
    outcome = resolvent("train", "--resume", run)
    assert outcome.code == 0
    assert "is finished: step 5 of 5" in outcome.out


def test_overwrite_replaces_a_run(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    arguments = ["train", "--data", text_file, "--out", tmp_path / "run", "--steps", 2, *small]
    assert resolvent(*arguments).code == 0
    outcome = resolvent(*arguments)
    assert outcome.code == 1
    assert "--overwrite" in outcome.err
    assert resolvent(*arguments, "--overwrite", "--validation-fraction", 0.3).code == 0
    assert read_run(tmp_path / "run")[0].validation_fraction == 0.3


def test_resume_finds_text_that_has_moved(resolvent: Resolvent, text_file: Path, small: list[str], tmp_path: Path):
    (tmp_path / "here.txt").write_bytes(text_file.read_bytes())
    resolvent("train", "--data", tmp_path / "here.txt", "--out", tmp_path / "run", "--steps", 3, *small)
    (tmp_path / "here.txt").rename(tmp_path / "there.txt")
    on = ["train", "--resume", tmp_path / "run", "--steps"]
    assert "here.txt" in resolvent(*on, 4).err
    assert resolvent(*on, 4, "--data", tmp_path / "there.txt").code == 0
    (tmp_path / "there.txt").write_bytes(text_file.read_bytes() + b"!")
    changed = resolvent(*on, 5, "--data", tmp_path / "there.txt")
    assert changed.code == 1 and "there.txt has changed" in changed.err


@pytest.mark.parametrize(("arguments", "device"), [([], None), (["--device", "cpu"], "cpu")])
def test_resume_keeps_the_device_by_default(
    resolvent: Resolvent, run_dir: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], device: str | None
):
    seen: list[str | None] = []
    resume = training.run.resume

    def look(directory: Path, *, device: Literal["auto", "cpu", "cuda"] | None = None, console: Any) -> Any:
        seen.append(device)
        return resume(directory, device=device, console=console)

    monkeypatch.setattr("resolvent.training.run.resume", look)
    assert resolvent("train", "--resume", run_dir, *arguments).code == 0
    assert seen == [device]


def test_resume_accepts_a_tracker(resolvent: Resolvent, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    resume = training.run.resume
    monkeypatch.setattr(
        "resolvent.training.run.resume", lambda *a, tracker, **k: seen.append(tracker) or resume(*a, **k)
    )
    assert resolvent("train", "--resume", run_dir, "--tracker", "tensorboard").code == 0
    assert seen == ["tensorboard"]


def test_stop_before_the_run_prints_no_resume_command(
    resolvent: Resolvent, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("resolvent.training.run.load_corpus", stop)
    outcome = resolvent("train", "--data", text_file, "--out", tmp_path / "run")
    assert outcome == (130, "Stopped.\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], "--steps"),
        (["--schedule", "linear"], "--schedule"),
        (["--set", "d_model"], "FIELD=VALUE"),
        (["--set", "vocab_size=9"], "--tokenizer"),
        (["--resume", "x", "--seed", "3"], "--seed"),
        (["--resume", "x", "--set", "n_layers=3"], "--set"),
        (["--resume", "x", "--seed", "0"], "--seed"),
        (["--resume", "x", "--overwrite"], "--overwrite"),
        (["--resume", "x", "--from", "y"], "--from"),
        (["--frobnicate"], "--frobnicate"),
        (["--preset", "huge"], "Unknown preset: huge"),
        (["--learning-rate", "-1"], "learning_rate must be > 0, got -1.0"),
        (["--set", "d_modell=3"], "d_modell"),
        (["--set", "head_dim=0"], "head_dim"),
        (["--set", f"head_dim={'9' * 5000}"], "head_dim must be an integer"),
        (["--set", f"head_dim={'[' * 5000}"], "head_dim must be an integer"),
    ],
)
def test_wrong_usage_is_exit_code_2(resolvent: Resolvent, arguments: list[str], message: str):
    outcome = resolvent("train", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "missing.txt"], "missing.txt"),
        (["train", "--tokenizer", "missing.json"], "missing.json"),
        (["train", "--resume", "missing"], "missing holds no training run"),
        (["train", "--from", "missing"], "missing holds no model"),
        (["evaluate", "missing"], "missing holds no model"),
        (["generate", "missing"], "missing holds no model"),
        (["convert", "smolm2", "out"], "there is no folder smolm2; did you mean smollm2"),
    ],
)
def test_errors_are_a_line_on_stderr(
    resolvent: Resolvent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    outcome = resolvent(*arguments)
    assert outcome.code == 1
    assert outcome.err.startswith("Error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err
    assert not outcome.out
    assert not any(tmp_path.iterdir())


def test_a_used_folder_names_both_remedies(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("train", "--out", run_dir)
    assert outcome.code == 1
    assert "--resume" in outcome.err and "--out" in outcome.err


def test_evaluate_without_a_run_asks_for_data(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    outcome = resolvent("evaluate", tmp_path)
    assert outcome.code == 1
    assert "--data" in outcome.err


def test_a_tokenizer_of_another_run_is_refused(resolvent: Resolvent, run_dir: Path, text_file: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    from resolvent.data import build_tokenizer, save_tokenizer

    save_tokenizer(build_tokenizer("bpe", load_documents(text_file), vocab_size=260), tmp_path)
    outcome = resolvent("generate", tmp_path)
    assert outcome.code == 1
    assert "260 tokens, the model 257" in outcome.err


def test_unexpected_errors_are_a_line_and_debug_shows_where(
    resolvent: Resolvent, run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise RuntimeError("something broke")

    monkeypatch.setenv("RESOLVENT_DEBUG", "")
    monkeypatch.setattr("resolvent.data.load_tokenizer", fail)
    outcome = resolvent("generate", run_dir)
    assert outcome.code == 1
    assert outcome.err == (
        "Error: unexpected RuntimeError: something broke (resolvent --debug generate ... shows where)\n"
    )
    with pytest.raises(RuntimeError, match="something broke"):
        resolvent("--debug", "generate", run_dir)


def test_a_panic_is_a_line(resolvent: Resolvent, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    class PanicException(BaseException):
        pass

    def fail(*_: object) -> None:
        raise PanicException("a regex broke")

    monkeypatch.setenv("RESOLVENT_DEBUG", "")
    monkeypatch.setattr("resolvent.data.load_tokenizer", fail)
    outcome = resolvent("generate", run_dir)
    assert outcome.code == 1
    assert outcome.err == "Error: the tokenizers library failed (a regex broke): use another tokenizer\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_prints_the_resume_command(
    text_file: Path, small: list[str], tmp_path: Path, number: signal.Signals
):
    run = tmp_path / "run"
    command = [sys.executable, "-c", "from resolvent.cli import main; main()", "train", "--steps", "1000000"]
    process = subprocess.Popen(
        [*command, "--data", str(text_file), "--out", str(run), *small],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert err == ""
    last_step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert f"Stopping after step {last_step}" in out
    assert out.splitlines()[-1] == f"Stopped. Go on with: resolvent train --resume {run}"
    assert (run / "checkpoints" / f"step-{last_step:08d}" / "optimizer.safetensors").exists()
    assert (run / "model.safetensors").exists()


@pytest.mark.parametrize("phase", [1, 2])
def test_fields_are_listed_with_defaults_and_descriptions(resolvent: Resolvent, phase: int):
    fields = json.loads(resolvent("presets", "--fields", "--phase", phase, "--json", "-").out)
    config = PHASES[phase].config
    assert list(fields) == [field.name for field in dataclasses.fields(config)]
    assert {name: field["default"] for name, field in fields.items()} == config().to_dict()
    assert fields["n_seq"]["default"] == config().n_seq and all(fields)
    assert sum(bool(field["description"]) for field in fields.values()) > len(fields) / 3
    page = resolvent("presets", "--fields", "--phase", phase).out
    assert "n_layers" in page and "null for" in page and "None" not in page
