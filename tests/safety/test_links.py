"""Links, pipes and second names in folders from elsewhere; and links that the user has made."""

import errno
import json
import logging
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from resolvent.data import load_tokenizer
from resolvent.errors import CheckpointError, ResolventError
from resolvent.files import (
    atomic_directory,
    atomic_file,
    atomic_output,
    open_regular,
    output_path,
    own_directory,
    partial_name,
    read_bytes,
    read_json,
    remove,
    write_file,
    write_output,
)
from resolvent.inspection.inspection import read_curves
from resolvent.manifest import MANIFEST
from resolvent.models import load_model
from resolvent.models.phase2 import Phase2State
from resolvent.runs import load_trained
from resolvent.training import resume, train
from resolvent.training.checkpoint import find_checkpoint
from resolvent.training.metrics import read_history
from resolvent.training.sharding import stored_shapes
from resolvent.training.tracking import ID_FILE
from tests.cli.conftest import call
from tests.safety.test_crashes import outcome
from tests.safety.victim import TEXT, minute_config

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "format-5"
VERSES = str(GOLDEN / "verses.txt")
LAST = Path("checkpoints") / "step-00000006"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has half of its steps before it."""
    folder = Path(shutil.copytree(GOLDEN / "run", tmp_path / "run"))
    shutil.rmtree(folder / LAST)
    return folder


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    """A file and a folder of the user's, which stay as they are."""
    folder = tmp_path / "precious"
    (folder / "step-00000001").mkdir(parents=True)
    (folder / ".step-00000002.partial").mkdir()
    (folder / "step-00000001" / "config.json").write_text("mine")
    (folder / "file").write_text("mine")
    before = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    yield folder
    assert {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")} == before


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where the block waits longer."""

    def fail(*_: object) -> None:
        raise TimeoutError(f"it waits for more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


PARTIALS = [
    ".metrics.jsonl.partial",
    ".model.safetensors.partial",
    "checkpoints/.step-00000006.partial",
    "checkpoints/.step-00000099.partial",
]


@pytest.mark.parametrize("name", [*PARTIALS, "checkpoints/step-00000006", "model.safetensors"])
@pytest.mark.parametrize("target", ["file", ".", "nowhere"])
def test_links_at_names_that_a_run_writes_are_replaced(run: Path, precious: Path, name: str, target: str):
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious / target)
    resume(run, data=VERSES)
    assert not (run / name).is_symlink()
    assert not (precious / "nowhere").exists()
    assert find_checkpoint(run) == (run / LAST, [])
    assert not list(run.rglob(partial_name(Path("*")).name))


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", MANIFEST, "tensorboard"])
@pytest.mark.parametrize("outside", [True, False])
def test_links_that_a_run_would_write_through_are_refused_by_name(
    run: Path, precious: Path, tmp_path: Path, name: str, outside: bool
):
    if outside:
        remove(run / name)
        (run / name).symlink_to(precious if name in ("checkpoints", "tensorboard") else precious / "file")
    else:  # what is there, moved somewhere else
        (run / name).rename(tmp_path / "moved") if (run / name).exists() else (tmp_path / "moved").mkdir()
        (run / name).symlink_to(tmp_path / "moved")
    before = {path: path.lstat().st_mtime_ns for path in [*run.rglob("*"), *(tmp_path / "moved").rglob("*")]}
    with pytest.raises(CheckpointError, match=rf"{name} is a link|{MANIFEST}: it holds|cannot read .*{MANIFEST}"):
        resume(run, data=VERSES, tracker="tensorboard" if name == "tensorboard" else None)
    if name != "tensorboard":  # which is made after the metrics were opened
        assert {
            path: path.lstat().st_mtime_ns for path in [*run.rglob("*"), *(tmp_path / "moved").rglob("*")]
        } == before


def test_linked_checkpoint_is_skipped(run: Path, precious: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shutil.copytree(GOLDEN / "run" / LAST, tmp_path / "theirs")
    (run / LAST).symlink_to(tmp_path / "theirs")
    before = (tmp_path / "theirs" / MANIFEST).stat().st_mtime_ns
    with caplog.at_level(logging.WARNING):
        resume(run, data=VERSES)
    assert "Going back to step-00000003" in caplog.text and "step-00000006 is a link" in caplog.text
    assert not (run / LAST).is_symlink() and (tmp_path / "theirs" / MANIFEST).stat().st_mtime_ns == before


def test_old_linked_checkpoint_is_removed_without_its_target(run: Path, precious: Path):
    (run / "checkpoints" / "step-00000001").symlink_to(precious)
    resume(run, data=VERSES)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("second_name", [Path.symlink_to, Path.hardlink_to])
def test_a_mark_with_a_second_name_is_refused(
    tmp_path: Path, precious: Path, second_name: Callable[[Path, Path], None]
):
    (tmp_path / "verses.txt").write_text(TEXT)
    mark = partial_name(tmp_path / "run" / MANIFEST)
    mark.parent.mkdir()
    second_name(mark, precious / "file")
    with pytest.raises(CheckpointError, match=r"manifest\.json\.partial is (a link|one of several names)"):
        train(minute_config(tmp_path / "verses.txt", tmp_path / "run"))


def test_a_mark_that_is_a_pipe_is_refused(tmp_path: Path):
    (tmp_path / "verses.txt").write_text(TEXT)
    mark = partial_name(tmp_path / "run" / MANIFEST)
    mark.parent.mkdir()
    os.mkfifo(mark)
    with within(30), pytest.raises(CheckpointError, match=r"manifest\.json\.partial is no regular file"):
        train(minute_config(tmp_path / "verses.txt", tmp_path / "run"))


def test_new_run_replaces_a_link_at_checkpoints(tmp_path: Path, precious: Path):
    (tmp_path / "verses.txt").write_text(TEXT)
    run = tmp_path / "run"
    run.mkdir()
    partial_name(run / MANIFEST).touch()
    (run / "checkpoints").symlink_to(precious)
    (run / "config.json").symlink_to(precious / "file")
    train(minute_config(tmp_path / "verses.txt", run))
    assert not (run / "checkpoints").is_symlink() and not (run / "config.json").is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors"])
def test_the_other_name_of_a_file_is_not_written_to(run: Path, tmp_path: Path, name: str):
    os.link(run / name, tmp_path / "other")
    before = (tmp_path / "other").read_bytes()
    resume(run, data=VERSES)
    assert (tmp_path / "other").read_bytes() == before
    assert not (run / name).samefile(tmp_path / "other")


def test_a_run_folder_that_the_user_names_may_be_a_link(tmp_path: Path):
    (tmp_path / "verses.txt").write_text(TEXT)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    train(minute_config(tmp_path / "verses.txt", tmp_path / "run"))
    assert (tmp_path / "run").is_symlink() and (tmp_path / "elsewhere" / MANIFEST).exists()
    resume(tmp_path / "run")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "other")
    resume(tmp_path / "other")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "other")


def test_files_that_are_links_can_be_read(tmp_path: Path):
    """Hubs keep snapshots so: a folder of links into a store."""
    for path in (GOLDEN / "run").rglob("*"):
        name = tmp_path / path.relative_to(GOLDEN / "run")
        name.mkdir() if path.is_dir() else name.symlink_to(path)
    load_trained(tmp_path, "cpu")
    assert read_curves(tmp_path / "metrics.jsonl").step
    with pytest.raises(CheckpointError, match=r"manifest\.json is a link"):
        resume(tmp_path, data=VERSES)


READ = ["config.json", "model.safetensors", "tokenizer.json", "training.json", MANIFEST, "metrics.jsonl"]
CHECKPOINT_FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.json", MANIFEST]


def occupy(path: Path, by: str) -> None:
    path.unlink()
    if by == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"circle": path.name, "device": "/dev/zero", "pipe link": path.with_name("pipe")}[by])
    if by == "pipe link":
        os.mkfifo(path.with_name("pipe"))


@pytest.mark.parametrize("by", ["pipe", "circle", "device", "pipe link"])
@pytest.mark.parametrize("name", READ)
def test_pipes_and_devices_never_block(run: Path, name: str, by: str):
    occupy(run / name, by)
    with within(30):
        if name == "model.safetensors":
            with pytest.raises(CheckpointError, match=name):
                load_model(run, device="cpu")
            return
        with pytest.raises(ResolventError, match=name):
            resume(run, data=VERSES)
        if name == "metrics.jsonl":
            with pytest.raises(CheckpointError, match=name):
                read_curves(run / name)
            with pytest.raises(CheckpointError, match=name):
                read_history(run)
        elif name in ("config.json", "tokenizer.json"):
            (run / MANIFEST).unlink()
            (run / "training.json").unlink()
            with pytest.raises(ResolventError, match=name):
                load_trained(run, "cpu")


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_checkpoint_with_a_pipe_is_skipped(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture):
    run = Path(shutil.copytree(GOLDEN / "run", tmp_path / "run"))
    occupy(run / LAST / name, "pipe")
    with within(30):
        resume(run, data=VERSES)
    assert "Going back to step-00000003" in caplog.text and name in caplog.text


def test_pipes_among_shards_never_block(tmp_path: Path):
    shutil.copy(GOLDEN / "run" / "model.safetensors", tmp_path)
    assert stored_shapes(tmp_path)
    os.mkfifo(tmp_path / "more.safetensors")
    with within(30), pytest.raises(CheckpointError, match=r"more\.safetensors"):
        stored_shapes(tmp_path)


def test_a_circle_of_links_is_an_error_where_the_user_names_it(tmp_path: Path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for action in (output_path, lambda path: read_bytes(path, 9), lambda path: write_output(path, b"")):
        with pytest.raises(OSError, match="symbolic links"):
            action(tmp_path / "a")
    with pytest.raises(CheckpointError, match="symbolic links"):
        read_json(tmp_path / "a")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "b").is_symlink()


def test_files_of_ours_are_new_ones_with_the_mode_that_umask_leaves(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"1")
        write_output(tmp_path / "b", b"1")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o640, 0o640]


def test_a_folder_of_ours_is_no_link(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(CheckpointError, match="link is a link"):
        own_directory(tmp_path / "link")
    own_directory(tmp_path / "own")
    assert own_directory(tmp_path / "own").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        own_directory(tmp_path / "file")


def test_the_target_of_a_link_that_the_user_names_is_written(tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")
    for link, target in (("a", "there/old"), ("b", "there/new"), ("c", "b")):
        (tmp_path / link).symlink_to(target)
        write_output(tmp_path / link, link.encode())
        assert (tmp_path / link).is_symlink() and (tmp_path / link).read_text() == link
    assert {path.name: path.read_text() for path in (tmp_path / "there").iterdir()} == {"old": "a", "new": "c"}


def test_link_at_a_library_name_is_replaced(tmp_path: Path):
    (tmp_path / "target").write_text("mine")
    for name in ("a", ".a.partial"):
        (tmp_path / name).symlink_to("target")
    write_file(tmp_path / "a", b"ours")
    assert not (tmp_path / "a").is_symlink() and (tmp_path / "target").read_text() == "mine"
    (tmp_path / ".folder.partial").symlink_to(tmp_path)
    with atomic_directory(tmp_path / "folder") as partial:
        write_file(partial / "b", b"ours")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"] and not (tmp_path / "b").exists()


def test_pipes_and_devices_that_the_user_names_are_written_to(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_output(tmp_path / "pipe", b"1")
    reader.join()
    write_output(Path("/dev/null"), b"1")
    assert read == [b"1"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_disk_leaves_the_old_output_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("old")
    (tmp_path / "link").symlink_to("there/old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_output(tmp_path / "link", b"new")
    with pytest.raises(OSError, match="No space left"), atomic_file(tmp_path / "there" / "old") as file:
        file.write(b"new")
    assert [(path.name, path.read_text()) for path in (tmp_path / "there").iterdir()] == [("old", "old")]


def test_two_processes_may_write_to_one_output(tmp_path: Path):
    with atomic_output(tmp_path / "a") as first, atomic_output(tmp_path / "a") as second:
        first.write(b"1" * 9)
        second.write(b"2")
    assert (tmp_path / "a").read_bytes() == b"1" * 9
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_state_is_saved_to_the_target_of_a_link(tmp_path: Path):
    model = load_model(GOLDEN / "run", device="cpu")
    _, state = model(torch.zeros(1, 3, dtype=torch.int64), return_state=True)
    (tmp_path / "link").symlink_to("target")
    state.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(Phase2State.load(tmp_path / "target")) == 1


def test_commands_write_to_the_targets_of_links(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    for name in ("found.json", "plot.png", "page.html"):
        (tmp_path / name).symlink_to(f"target of {name}")
    small = ["--device", "cpu", "--length", 16]
    where = ["--json", tmp_path / "found.json", "--plot", tmp_path / "plot.png"]
    run = GOLDEN / "run"
    assert call("evaluate", "positions", run, "--data", VERSES, "--sequences", 2, *where, *small) == 0
    assert call("inspect", run, "--text", "A verse.", "--out", tmp_path / "page.html", *small) == 0
    assert json.loads((tmp_path / "target of found.json").read_text())["rows"]
    assert (tmp_path / "target of plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "target of page.html").read_text().startswith("<!")
    assert sum(path.is_symlink() for path in tmp_path.iterdir()) == 3 and len(list(tmp_path.iterdir())) == 6
    (tmp_path / "circle.json").symlink_to("circle.json")
    capfd.readouterr()
    assert call("evaluate", "positions", run, "--data", VERSES, "--json", tmp_path / "circle.json", *small) == 2


def test_the_default_page_replaces_a_link_in_the_run_folder(run: Path, precious: Path):
    (run / "inspection.html").symlink_to(precious / "file")
    assert call("inspect", run, "--text", "A verse.", "--length", 9, "--device", "cpu") == 0
    assert not (run / "inspection.html").is_symlink()


@pytest.mark.parametrize("content", ["link", '{"id": "../../x"}', '{"id": "abc"}', "{}"])
def test_foreign_tracker_id_is_refused(run: Path, precious: Path, content: str, monkeypatch: pytest.MonkeyPatch):
    if content == "link":
        (run / ID_FILE).symlink_to(precious / "file")
    else:
        (run / ID_FILE).write_text(content)
    monkeypatch.setattr("resolvent.training.processes.tracker_options", lambda config: {})
    with pytest.raises(CheckpointError, match=r"cannot read|is a link|holds no id"):
        resume(run, data=VERSES, tracker="wandb")


def test_tokenizers_are_read_through_links_to_files_only(tmp_path: Path):
    (tmp_path / "tokenizer.json").symlink_to(GOLDEN / "run" / "tokenizer.json")
    assert load_tokenizer(tmp_path).get_vocab_size() == 257
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
