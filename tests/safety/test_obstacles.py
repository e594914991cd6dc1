"""A folder that cannot be written, a run that is in use, a signal at any moment: one clear line, and nothing lost."""

import errno
import importlib
import os
import random
import resource
import select
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resolvent.data import encoding, tokenization
from resolvent.errors import CheckpointError, ConfigError
from resolvent.files import atomic_directory, locked, partial_name, write_file
from resolvent.manifest import MANIFEST
from resolvent.training import resume, train
from resolvent.training.checkpoint import find_checkpoint, load_trainer_state
from resolvent.training.run_folder import has_begun, new_run
from resolvent.training.trainer import Trainer
from tests.cli.conftest import call
from tests.safety.test_crashes import outcome
from tests.safety.victim import TEXT, fork, minute_config, start


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "verses.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def expected(text: Path, tmp_path: Path) -> dict[str, object]:
    train(minute_config(text, tmp_path / "undisturbed"))
    return outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize("room", [0, 3, 9, 14, 20, 31, 40])
def test_a_disk_that_fills_up(
    text: Path, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
):
    """As late as it may say so, when a file is synced: at the beginning, in a checkpoint, in the weights."""
    run, fsync, synced = tmp_path / "run", os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*(free space|another one)"):
            train(minute_config(text, run))
    assert not list(tmp_path.rglob(partial_name(Path("*")).name))  # which would take room
    if has_begun(run):
        assert not find_checkpoint(run)[1]
        resume(run)
    else:
        assert not run.exists()
        train(minute_config(text, run))
    assert outcome(run) == expected


def limited(text: Path, run: Path, most_bytes: int, result: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        train(minute_config(text, run))
    except CheckpointError as error:
        result.symlink_to(str(error))  # which takes no bytes


@pytest.mark.parametrize("most_bytes", [1_000, 8_000, 30_000])
def test_files_that_may_not_grow(text: Path, expected: dict[str, object], tmp_path: Path, most_bytes: int):
    """The kernel itself refuses what is too long: the tokenizer, the weights, the optimiser's state."""
    run, result = tmp_path / "run", tmp_path / "result"
    process = fork(limited, text, run, most_bytes, result)
    process.join()
    assert process.exitcode == 0
    assert "File too large" in os.readlink(result)
    resume(run) if has_begun(run) else train(minute_config(text, run))
    assert outcome(run) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs rights that this user lacks")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_that_fills_up(text: Path, expected: dict[str, object], small_disk: Path):
    run = small_disk / "run"
    with pytest.raises(CheckpointError, match=r"No space left on device.*free space"):
        train(minute_config(text, run))
    assert find_checkpoint(run)[0] is not None and not find_checkpoint(run)[1]
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    resume(run)
    assert outcome(run) == expected


def test_a_folder_that_is_read_only(text: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]):
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    train(minute_config(text, small_disk / "run"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*--out"):
        train(minute_config(text, small_disk / "other"))
    with pytest.raises(CheckpointError, match="Read-only file system"):
        resume(small_disk / "run")
    capfd.readouterr()
    assert call("generate", small_disk / "run", "--max-new-tokens", 2) == 0


def test_a_folder_that_may_not_be_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = os.open

    def refuse(path: object, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "run")
        return opened(path, flags, *arguments, **options)  # type: ignore[arg-type]

    train(minute_config(text, tmp_path / "run"))
    before = outcome(tmp_path / "run")
    monkeypatch.setattr("resolvent.files.os.open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write to .*run: .*Permission denied"):
        resume(tmp_path / "run")
    monkeypatch.undo()
    assert outcome(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("function", "number"), [("rmtree", errno.ENOTEMPTY), ("rmtree", errno.EACCES), ("rename", errno.EBUSY)]
)
@pytest.mark.parametrize("failures", [1, 99])
def test_an_old_checkpoint_that_cannot_be_removed_stops_no_run(
    text: Path,
    expected: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    number: int,
    failures: int,
):
    """A network file system keeps what somebody has open. The next save tries again."""
    run, owner, left = tmp_path / "run", {"rmtree": shutil, "rename": Path}[function], failures
    working = getattr(owner, function)

    def fail(path: Path, *arguments: Any, **options: Any) -> object:
        nonlocal left
        if path.name.startswith("step-00000002" if function == "rename" else ".step-00000002") and left:
            left -= 1
            raise OSError(number, os.strerror(number), str(path))
        return working(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        train(minute_config(text, run))
    warnings = [record.getMessage() for record in caplog.records if "Cannot remove" in record.getMessage()]
    assert len(warnings) == min(failures, 3) and os.strerror(number) in warnings[0]  # saved at 5, 6 and 7
    found = outcome(run)
    if failures > 1:
        (remains,) = (path for path in (run / "checkpoints").iterdir() if "step-00000002" in path.name)
        shutil.rmtree(remains)
        found = outcome(run)
    assert found == expected


def test_remains_of_a_killed_save_stop_no_run(
    text: Path, expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, working = tmp_path / "run", shutil.rmtree
    remains = run / "checkpoints" / ".step-00000004.partial"

    def fail(path: Path, *arguments: Any, **options: Any) -> None:
        if "step-00000004.partial" in path.name:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        working(path, *arguments, **options)

    def leave(*arguments: Any) -> None:
        remains.mkdir(parents=True)
        (remains / ".nfs0001").touch()
        step(*arguments)
        monkeypatch.setattr(Trainer, "_step", step)

    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", leave)
    monkeypatch.setattr(shutil, "rmtree", fail)
    train(minute_config(text, run))
    (remains,) = (run / "checkpoints").glob(".*")
    working(remains)
    assert outcome(run) == expected


def test_a_run_in_use_is_refused(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    train(minute_config(text, run))
    before = outcome(run)
    with locked(run / MANIFEST):
        assert call("train", "--resume", run) == 1
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"Error: the run in {run} is in use by another process: wait for its end, or stop it\n")
    assert outcome(run) == before
    assert call("train", "--resume", run) == 0


def test_one_of_two_simultaneous_starts_is_refused(text: Path, tmp_path: Path):
    with new_run(tmp_path / "run"), pytest.raises(CheckpointError, match="in use by another process"):
        train(minute_config(text, tmp_path / "run"))
    train(minute_config(text, tmp_path / "run"))
    with pytest.raises(ConfigError, match="not empty"):
        train(minute_config(text, tmp_path / "run"))


def test_one_of_many_processes_trains(text: Path, expected: dict[str, object], tmp_path: Path):
    run = tmp_path / "run"
    processes = [start(text, run) for _ in range(4)]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes)[0] == 0
    assert outcome(run) == expected


def test_a_used_folder_stays_as_it_is(text: Path, tmp_path: Path):
    """Also one that a run began in, whose manifest somebody has removed."""
    run = tmp_path / "run"
    train(minute_config(text, run))
    (run / MANIFEST).unlink()
    before = outcome(run)
    with pytest.raises(ConfigError, match="not empty"):
        train(minute_config(text, run))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        resume(run)
    assert outcome(run) == before


def wait_at(name: str, text: Path, run: Path, said: Path) -> None:
    """The command line, which waits for a signal where it would call a function."""

    def wait(*_: object, **__: object) -> None:
        said.with_suffix(".waiting").touch()
        time.sleep(60)

    module, _, function = name.rpartition(".")
    setattr(importlib.import_module(module), function, wait)
    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sizes = [part for size in ("d_model=16", "n_layers=1", "num_heads=2", "head_dim=8") for part in ("--set", size)]
    options = ["--steps", "1", "--seq-len", "32", "--batch-size", "2", "--eval-interval", "0", *sizes]
    os._exit(call("train", "--data", text, "--out", run, *options))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("name", "last_words"),
    [
        ("resolvent.training.run.load_corpus", "Stopped."),
        ("resolvent.data.cache.write_tokens", "Stopped."),
        ("resolvent.training.validation.sum_of_nats", "Stopped. Go on with: resolvent train --resume {}"),
    ],
)
def test_a_signal_outside_the_steps(text: Path, tmp_path: Path, number: signal.Signals, name: str, last_words: str):
    """While the text is read, and while the last validation runs, after the last checkpoint."""
    run, said = tmp_path / "run", tmp_path / "said"
    process = fork(wait_at, name, text, run, said)
    while not said.with_suffix(".waiting").exists():
        assert process.exitcode is None
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    assert said.read_text().splitlines()[-1] == last_words.format(run)
    assert "Error" not in said.read_text()
    assert run.exists() == (last_words != "Stopped.")


def in_terminal(terminal: str, text: Path, run: Path) -> None:
    """The command line in a session of its own, whose terminal this is."""
    os.setsid()
    output = os.open(terminal, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(output, descriptor)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115  those of before were of files
    sizes = [part for size in ("d_model=16", "n_layers=1", "num_heads=2", "head_dim=8") for part in ("--set", size)]
    options = ["--steps", "100000", "--seq-len", "32", "--batch-size", "2", "--eval-interval", "0", *sizes]
    os._exit(call("train", "--data", text, "--out", run, "--checkpoint-interval", "0", *options))


def test_a_run_whose_terminal_is_closed_is_saved(text: Path, tmp_path: Path):
    run = tmp_path / "run"
    terminal, inner = os.openpty()
    process = fork(in_terminal, os.ttyname(inner), text, run)
    said = b""
    while b"tokens/s" not in said:
        assert process.exitcode is None, said
        if select.select([terminal], [], [], 0.1)[0]:
            said += os.read(terminal, 4096)
    os.close(inner)
    os.close(terminal)
    process.join()
    assert process.exitcode == 128 + signal.SIGHUP
    checkpoint, faults = find_checkpoint(run)
    assert checkpoint is not None
    assert not faults
    assert load_trainer_state(checkpoint).step > 0


def learn_words(text: Path, run: Path, said: Path, count: int) -> None:
    """The command line, which says when it begins to train a tokenizer and when to encode with it."""

    def telling(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def told(*arguments: object) -> object:
            said.with_suffix(f".{name}").touch()
            return function(*arguments)

        return told

    for module in (tokenization, encoding):
        name = module.__name__.rpartition(".")[2]
        module.call = telling(name, module.call)
    os._exit(call("train", "--data", text, "--out", run, "--tokenizer", "bpe", "--vocab-size", count))


@pytest.mark.parametrize(("moment", "count"), [("tokenization", 2000), ("encoding", 300)])
def test_sigterm_interrupts_a_long_library_call(tmp_path: Path, moment: str, count: int):
    """A text of letters without a space: training takes seconds then, and so does encoding."""
    letters = random.Random(0).choices(string.ascii_lowercase, k=1_500_000)
    text, said = tmp_path / "letters.txt", tmp_path / "said"
    text.write_text("".join(letters))
    process = fork(learn_words, text, tmp_path / "run", said, count)
    while not said.with_suffix(f".{moment}").exists():
        assert process.exitcode is None
        time.sleep(0.01)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 2


def test_files_are_synced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To survive a power cut, contents are synced first, then the name, then its folder."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def note(event: str, function: Callable[..., object]) -> Callable[..., object]:
        def noted(target: int | Path, *arguments: object) -> object:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            events.append((event, os.path.relpath(path, tmp_path)))
            return function(target, *arguments)

        return noted

    monkeypatch.setattr(os, "fsync", note("sync", fsync))
    monkeypatch.setattr(Path, "rename", note("name", rename))
    monkeypatch.setattr(Path, "replace", note("name", replace))
    write_file(tmp_path / "a", b"1")
    assert events == [("sync", ".a.partial"), ("name", ".a.partial"), ("sync", ".")]
    events.clear()
    with atomic_directory(tmp_path / "b") as partial:
        (partial / "c").write_text("1")
    assert events == [("sync", ".b.partial/c"), ("sync", ".b.partial"), ("name", ".b.partial"), ("sync", ".")]
