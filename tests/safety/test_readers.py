"""A run that is read while it saves: every read is whole."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from resolvent import manifest
from resolvent.data import save_tokenizer
from resolvent.data.tokenization import bytes_tokenizer
from resolvent.errors import CheckpointError
from resolvent.files import write_file
from resolvent.manifest import check_files, read_checked, write_manifest
from resolvent.models.phase2 import Phase2Config, create_phase2_model
from resolvent.models.storage import named_weights, write_config, write_weights
from resolvent.runs import load_trained
from resolvent.tensors import read_tensors, write_tensors
from resolvent.training.average import Average
from resolvent.training.checkpoint import TrainerState, save_checkpoint
from resolvent.training.optimizer import build_optimizer
from tests.safety.victim import fork

GONE = "was removed while it was read"


def save_for_ever(run: Path) -> None:
    """Save as a trainer does, as fast as it goes: other weights, and a checkpoint, every time."""
    config = Phase2Config(vocab_size=257, d_model=16, n_layers=1, n_seq=32, num_heads=2, head_dim=8)
    model = create_phase2_model(config=config, device="cpu")
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95))
    run.mkdir()
    save_tokenizer(bytes_tokenizer(), run)
    write_config(model, run)
    step = 0
    while True:
        step += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        save_checkpoint(run, model, optimizer, TrainerState(step, 1, Average()), keep=2)
        write_weights(named_weights(model), run)


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def read(run: Path, until: float) -> Counter[str]:
    """Read a run folder and its newest checkpoint in turn; how often it went well, and every other outcome."""
    outcomes: Counter[str] = Counter()
    while time.monotonic() < until:
        for folder in (run, newest_checkpoint(run)):
            try:
                model, _ = load_trained(folder, "cpu")
            except CheckpointError as error:
                gone = GONE in str(error) or ("holds no model" in str(error) and not folder.exists())
                outcomes[GONE if gone else str(error)] += 1
            else:
                assert len({x.flatten()[0].item() for x in model.parameters()}) == 1  # all are of one step
                outcomes["read"] += 1
    return outcomes


def read_in_threads(run: Path, threads: int, until: float) -> Counter[str]:
    found: list[Counter[str]] = []
    readers = [threading.Thread(target=lambda: found.append(read(run, until))) for _ in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(found) == threads
    return sum(found, Counter())


def read_into(run: Path, threads: int, until: float, result: Path) -> None:
    outcomes = read_in_threads(run, threads, until)
    result.write_text("\n".join(f"{count} {outcome}" for outcome, count in outcomes.items()))


def beside_a_writer(run: Path, action: Callable[[], Counter[str]]) -> Counter[str]:
    writer = fork(save_for_ever, run)
    try:
        while not (run / "model.safetensors").exists():
            assert writer.exitcode is None
            time.sleep(0.01)
        outcomes = action()
        assert writer.exitcode is None
    finally:
        writer.kill()
        writer.join()
    return outcomes


def test_weights_replaced_between_two_opens_are_read_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The library opens a file once for its metadata and once for its tensors."""
    path, newer, from_file = tmp_path / "a", tmp_path / "b", torch.UntypedStorage.from_file
    write_tensors(path, {"x": torch.zeros(3)})
    write_tensors(newer, {"x": torch.ones(3)})

    def replace_first(*arguments: Any, **options: Any) -> torch.UntypedStorage:
        if newer.exists():
            newer.replace(path)
        return from_file(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replace_first)
    assert read_tensors(path)["x"].tolist() == [0, 0, 0]
    assert not newer.exists()
    assert read_tensors(path)["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "check", [lambda folder: check_files(folder, ["a"]), lambda folder: read_checked(folder / "a", 9)]
)
def test_files_replaced_while_they_are_compared_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], object]
):
    read_manifest, contents = manifest._read_manifest, [b"2", b"3"]

    def replace_between(folder: Path) -> dict[str, Any]:
        if contents:  # between manifest and file: one of them is of before
            write_file(folder / "a", contents.pop())
            write_manifest(folder, ["a"])
            listed = read_manifest(folder)
            write_file(folder / "a", b"4")
            write_manifest(folder, ["a"])
            return listed
        return read_manifest(folder)

    write_file(tmp_path / "a", b"1")
    write_manifest(tmp_path, ["a"])
    monkeypatch.setattr(manifest, "_read_manifest", replace_between)
    check(tmp_path)
    assert not contents
    write_file(tmp_path / "a", b"5")
    with pytest.raises(CheckpointError, match="another SHA-256"):  # no process is writing
        check(tmp_path)


def test_reads_beside_a_writer_are_whole(tmp_path: Path):
    run = tmp_path / "run"
    outcomes = beside_a_writer(run, lambda: read_in_threads(run, 8, time.monotonic() + 1.5))
    assert outcomes.keys() <= {"read", GONE}, outcomes
    assert outcomes["read"] > 5


@pytest.mark.slow
def test_200_readers_beside_a_writer_find_no_damage(tmp_path: Path, record_property: Callable[[str, object], None]):
    run, processes, threads = tmp_path / "run", 10, 20

    def read_in_processes() -> Counter[str]:
        until = time.monotonic() + 60
        results = [tmp_path / f"result-{number}" for number in range(processes)]
        readers: list[BaseProcess] = [fork(read_into, run, threads, until, result) for result in results]
        for reader in readers:
            reader.join()
        lines = [line.split(" ", 1) for result in results for line in result.read_text().splitlines()]
        outcomes: Counter[str] = Counter()
        for count, outcome in lines:
            outcomes[outcome] += int(count)
        return outcomes

    outcomes = beside_a_writer(run, read_in_processes)
    saved = int(newest_checkpoint(run).name.removeprefix("step-"))
    print(f"{processes * threads} readers, {saved} saves, {dict(outcomes)}")
    record_property("outcomes", dict(outcomes))
    assert outcomes.keys() <= {"read", GONE}, outcomes
    assert outcomes["read"] > 1000 and saved > 100
