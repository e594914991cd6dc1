"""A run that is killed, at whatever moment, goes on as if it had not been."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent.files import partial_name
from resolvent.models import load_model
from resolvent.training.checkpoint import find_checkpoint, load_trainer_state
from resolvent.training.config import Tracker
from resolvent.training.run_folder import has_begun
from tests.safety.victim import TEXT, minute_config, start
from tests.training.test_tracking import scalars

STEPS = minute_config(Path(), Path()).steps


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "verses.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An undisturbed run, and the number of its operations on its folder."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(text, folder / "run", count_into=folder / "count")
    process.join()
    assert process.exitcode == 0
    return folder / "run", int((folder / "count").read_text())


def outcome(run: Path) -> dict[str, Any]:
    """All that a run comes to, but for how fast it was."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        record.pop("tokens_per_second", None)
    checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
    tensors = [run / "model.safetensors", checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"]
    return {
        "metrics": metrics,
        "tensors": [path.read_bytes() for path in tensors],
        "average": load_trainer_state(checkpoint).loss_average,
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
    }


def assert_nothing_is_lost(run: Path) -> None:
    """Check that a killed run can be resumed or has not begun, and that its model, if any, is whole."""
    if has_begun(run):
        _, faults = find_checkpoint(run)
        assert not faults
        if (run / "model.safetensors").exists():
            load_model(run, device="cpu")


def die_and_resume(text: Path, run: Path, die_at: int, tracker: Tracker = "none") -> None:
    victim = start(text, run, die_at, tracker=tracker)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert_nothing_is_lost(run)
    heir = start(text, run, tracker=tracker)
    heir.join()
    assert heir.exitcode == 0


@pytest.mark.parametrize("part", [0.02, 0.2, 0.55, 0.93])
def test_killed_between_two_accesses_of_the_folder(whole: tuple[Path, int], text: Path, tmp_path: Path, part: float):
    undisturbed, touches = whole
    die_and_resume(text, tmp_path / "run", die_at=max(1, round(part * touches)))
    assert outcome(tmp_path / "run") == outcome(undisturbed)


@pytest.mark.parametrize("part", [0.3, pytest.param(0.7, marks=pytest.mark.slow)])
def test_killed_tracked_run_has_the_same_entry(whole: tuple[Path, int], text: Path, tmp_path: Path, part: float):
    """The run itself equals one without a tracker."""
    assert start(text, tmp_path / "whole", tracker="tensorboard").join() is None
    die_and_resume(text, tmp_path / "run", die_at=round(part * whole[1]), tracker="tensorboard")
    assert scalars(tmp_path / "run") == scalars(tmp_path / "whole") != {}
    for run in ("whole", "run"):
        found = outcome(tmp_path / run)
        found["files"] = [file for file in found["files"] if not file.startswith("tensorboard")]
        assert found == outcome(whole[0])


@pytest.mark.slow
def test_killed_before_every_access_of_the_folder(whole: tuple[Path, int], text: Path, tmp_path: Path):
    undisturbed, touches = whole
    assert touches > 100
    expected = outcome(undisturbed)
    for number in range(1, touches + 1):
        die_and_resume(text, tmp_path / "run", die_at=number)
        assert outcome(tmp_path / "run") == expected, number
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    whole: tuple[Path, int], text: Path, tmp_path: Path, kills: int, record_property: Callable[[str, object], None]
):
    """Several times a run, until it gets to its end between two kills."""
    moments = random.Random(kills)
    expected = outcome(whole[0])
    began = time.perf_counter()
    start(text, tmp_path / "timed").join()
    duration = time.perf_counter() - began
    done = runs = writing = 0
    while done < kills:
        run = tmp_path / f"run{runs}"
        victim = start(text, run)
        while victim.join(moments.uniform(0, duration)) or victim.exitcode is None:
            victim.kill()
            victim.join()
            done += 1
            writing += any(run.rglob(partial_name(Path("*")).name))
            assert_nothing_is_lost(run)
            victim = start(text, run)
        assert victim.exitcode == 0
        assert outcome(run) == expected
        shutil.rmtree(run)
        runs += 1
    record_property("runs", runs)
    print(f"{done} kills, {writing} of them in the middle of writing, {runs} runs")
