"""Files of a run that are damaged in any way.

There is an error that names them before anything is written, or a step back that is announced, or no difference at all.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resolvent.errors import ResolventError
from resolvent.runs import load_trained
from resolvent.tensors import read_tensors
from resolvent.training import resume
from resolvent.training.trainer import Trainer
from tests.training.runs import contents, metrics

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "format-5"
FILES = sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*") if path.is_file())
FILES.remove("expected.json")
NEWEST = "run/checkpoints/step-00000006"


@dataclass(frozen=True)
class Damage:
    """Damage of a file."""

    kind: str
    file: str
    other: str
    position: float
    byte: int

    def do(self, folder: Path) -> None:
        path, other = folder / self.file, folder / self.other
        content = path.read_bytes()
        place = min(int(self.position * len(content)), len(content) - 1)
        match self.kind:
            case "flip":
                path.write_bytes(content[:place] + bytes([content[place] ^ self.byte]) + content[place + 1 :])
            case "truncate":
                path.write_bytes(content[:place])
            case "zero":  # a block that never reached the disk
                path.write_bytes(content[:place] + bytes(len(content[place : place + 512])) + content[place + 512 :])
            case "extend":
                path.write_bytes(content + bytes([self.byte]) * 3)
            case "delete":
                path.unlink()
            case "folder":
                path.unlink()
                path.mkdir()
            case "swap":
                path.write_bytes(other.read_bytes())
                other.write_bytes(content)


KINDS = ("flip", "truncate", "zero", "extend", "delete", "folder", "swap")
DAMAGES = st.builds(
    Damage,
    kind=st.sampled_from(("flip", *KINDS)),
    file=st.sampled_from(FILES),
    other=st.sampled_from(FILES),
    position=st.floats(0, 1),
    byte=st.integers(1, 255),
).filter(lambda damage: (damage.kind, damage.file) != ("folder", "run/model.safetensors"))  # found when writing only


@dataclass(repr=False)
class Undisturbed:
    """Results of an undamaged run."""

    metrics: dict[int, list[list[dict[str, Any]]]]
    weights: dict[int, bytes]
    logits: dict[int, torch.Tensor]


def logits(run: Path) -> torch.Tensor:
    model, tokenizer = load_trained(run, "cpu")
    with torch.inference_mode():
        return model(torch.tensor([tokenizer.encode("Verse 3: the père").ids]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """By the step that the run resumes from: they differ where another machine, or an older release, made the run."""
    lines, weights, says = {}, {}, {}
    for step in (6, 3):
        folder = Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("golden") / "golden"))
        if step == 3:
            shutil.rmtree(folder / NEWEST)
        lines[step] = [metrics(folder / "run")] if step == 6 else []
        (folder / "run" / "result.json").unlink()  # so that the finished run is validated on this machine, too
        resume(folder / "run", data=str(folder / "verses.txt"))
        weights[step], says[step] = (folder / "run" / "model.safetensors").read_bytes(), logits(folder / "run")
        lines[step].append(metrics(folder / "run"))
    earlier = folder / "run" / "checkpoints" / "step-00000003"
    says[0], weights[0] = logits(earlier), (earlier / "model.safetensors").read_bytes()
    return Undisturbed(lines, weights, says)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "golden"


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Capture the warnings of the library."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("resolvent").addHandler(handler)
    yield said
    logging.getLogger("resolvent").removeHandler(handler)


def damaged(folder: Path, *damages: Damage) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN, folder)
    for damage in damages:
        if all((folder / file).is_file() and (folder / file).stat().st_size for file in (damage.file, damage.other)):
            damage.do(folder)
    return folder / "run"


def refused(action: Callable[[], object], folder: Path) -> bool:
    """Return True if an action is refused with one line that names a file or folder of the run, and writes nothing."""
    before, message = contents(folder), ""
    try:
        action()
    except ResolventError as error:
        message = str(error)
    if not message:
        return False
    assert contents(folder) == before
    assert str(folder) in message and len(message) < 2000 and "\n" not in message, message
    return True


def check(damages: list[Damage], folder: Path, expected: Undisturbed, warnings: list[str]) -> None:
    run = damaged(folder, *damages)
    touched = {file for damage in damages for file in (damage.file, *([damage.other] * (damage.kind == "swap")))}
    said: list[torch.Tensor] = []
    if not refused(lambda: said.append(logits(run)), folder):
        # Whole weights of an earlier step are a model, too.
        known = [expected.logits[6]] + [expected.logits[0]] * ("run/model.safetensors" in touched)
        assert any(torch.equal(said[0], each) for each in known)
    warnings.clear()
    cache = str(folder.parent / "token-cache")  # tokens are no part of the run, and refusals come after them, too
    if refused(lambda: resume(run, data=str(folder / "verses.txt"), cache=cache), folder):
        return
    resumed = 3 if any("Going back to step-00000003" in line for line in warnings) else 6
    assert (run / "model.safetensors").read_bytes() == expected.weights[resumed]
    assert read_tensors(run / "model.safetensors").keys()
    if any("metrics.jsonl is missing" in line for line in warnings):
        assert "run/metrics.jsonl" in touched
    else:
        assert metrics(run) in expected.metrics[resumed]


def cases(number: int) -> Callable[[Any], Any]:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=checks)


@cases(60)
@given(damage=DAMAGES)
def test_a_damaged_file(damage: Damage, folder: Path, undisturbed: Undisturbed, warnings: list[str]):
    check([damage], folder, undisturbed, warnings)


@pytest.mark.slow
@cases(1600)
@given(damage=DAMAGES)
def test_any_damaged_file(damage: Damage, folder: Path, undisturbed: Undisturbed, warnings: list[str]):
    check([damage], folder, undisturbed, warnings)


@pytest.mark.slow
@cases(600)
@given(damages=st.lists(DAMAGES, min_size=2, max_size=4))
def test_several_damaged_files(damages: list[Damage], folder: Path, undisturbed: Undisturbed, warnings: list[str]):
    check(damages, folder, undisturbed, warnings)


@pytest.mark.parametrize(
    "file", ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "trainer.json"]
)
def test_damaged_checkpoint_is_skipped(file: str, folder: Path, undisturbed: Undisturbed, warnings: list[str]):
    run = damaged(folder, Damage("flip", f"{NEWEST}/{file}", f"{NEWEST}/{file}", 0.4, 2))
    resume(run, data=str(folder / "verses.txt"))
    assert len(warnings) == 1
    assert file in warnings[0] and warnings[0].startswith("Going back to step-00000003: ")
    assert (run / "model.safetensors").read_bytes() == undisturbed.weights[3]
    warnings.clear()
    resume(run, data=str(folder / "verses.txt"))  # the damaged one was replaced
    assert not warnings


def test_damaged_checkpoint_stays_until_it_is_replaced(folder: Path):
    """Somebody may know how to mend it."""
    run = damaged(folder, Damage("flip", f"{NEWEST}/trainer.json", f"{NEWEST}/trainer.json", 0.4, 2))
    before = contents(folder / NEWEST)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            resume(run, data=str(folder / "verses.txt"))
    assert contents(folder / NEWEST) == before
