"""States on disk: found again to the bit, bounded, damaged ones dropped, shared by servers."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.models.sampling import SamplingOptions
from resolvent.serving import state_files
from resolvent.serving.engine import Engine
from resolvent.serving.prefix_cache import PrefixCache, block_keys
from resolvent.serving.requests import Failure, Request, TokenEvent
from resolvent.serving.state_files import StateFiles
from tests.models.small import FULL, HYBRID, PHASE1, PHASE2, tokens

BLOCK = 32
KINDS = dict(phase1=PHASE1, phase2=PHASE2, hybrid=HYBRID, full=FULL)


@pytest.fixture(params=[HYBRID], ids=["hybrid"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param.model().eval()


def files_of(folder: Path, model: Any, most_bytes: int = 1 << 24, block: int = BLOCK) -> StateFiles:
    return StateFiles(folder, model, block=block, most_bytes=most_bytes)


def read(model: Any, count: int) -> Any:
    """The state after some blocks."""
    ids = torch.randint(0, model.vocab_size, (1, count * BLOCK), generator=torch.Generator().manual_seed(count))
    with torch.inference_mode():
        return model(ids, return_state=True)[1]


def write(folder: Path, model: Any, *keys: bytes, **options: int) -> None:
    files = files_of(folder, model, **options)
    for key in keys:
        files.store(key, read(model, 2))
    files.close()


def answer(engine: Engine, prompt: torch.Tensor) -> tuple[list[int], int]:
    """The tokens that the engine writes, and the number of tokens of the prompt that it did not read."""
    written, done = [], threading.Event()

    def deliver(event: TokenEvent | Failure) -> None:
        assert isinstance(event, TokenEvent), event.error
        written.append(event.token)
        if event.finish is not None:
            done.set()

    request = Request(
        tokens=prompt[0].numpy(), max_tokens=6, options=SamplingOptions(temperature=1.0), seeds=[7], logprobs=1
    )
    (ticket,) = engine.submit([request], [deliver])
    assert done.wait(60)
    return written, ticket.cached


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS.keys(), indirect=True)
def test_state_comes_back_to_the_bit(model: Any, tmp_path: Path):
    state = read(model, 2)
    write(tmp_path / "states", model, b"key")
    files = files_of(tmp_path / "states", model)
    found = files.load(b"key", 2)
    assert found is not None
    for ours, theirs in zip(found.tensors(), state.tensors(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert files.load(b"other", 2) is None
    files.close()


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS.keys(), indirect=True)
def test_engine_that_starts_again_reads_the_rest_of_a_prompt_only(model: Any, tmp_path: Path):
    prompt, seen = tokens(3 * BLOCK + 5, batch=1), []
    for folder in (tmp_path / "states", tmp_path / "states", tmp_path / "empty"):
        engine = Engine(model, block=BLOCK, files=files_of(folder, model))
        engine.start()
        seen.append((answer(engine, prompt), engine.counters.read))
        engine.close()
    (first, again, fresh) = seen
    assert first == fresh == ((first[0][0], 0), 3 * BLOCK + 5)
    assert again == ((first[0][0], 3 * BLOCK), 5)


def test_two_engines_share_a_folder(model: Any, tmp_path: Path):
    """Each of two running engines finds the states of the other."""
    prompt = tokens(2 * BLOCK + 5, batch=1)
    engines = [Engine(model, block=BLOCK, files=files_of(tmp_path, model)) for _ in range(2)]
    for engine in engines:
        engine.start()
    first = answer(engines[0], prompt)
    engines[0].close()
    assert answer(engines[1], prompt) == (first[0], 2 * BLOCK)
    engines[1].close()


def test_writers_and_readers_at_once_see_whole_files(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Four servers write, read and evict the same files of a folder that is too small for all."""
    state, keys = read(model, 2), [bytes([i]) for i in range(6)]
    write(tmp_path, model, keys[0])
    size = next(tmp_path.glob("*.state")).stat().st_size
    found: list[bool] = []

    def serve() -> None:
        files = files_of(tmp_path, model, most_bytes=3 * size)
        for _ in range(8):
            for key in keys:
                files.store(key, state)
                loaded = files.load(key, 2)
                found.append(loaded is not None)
                assert loaded is None or all(map(torch.equal, loaded.tensors(), state.tensors()))
        files.close()

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 8 * 6 and any(found)
    assert not caplog.records
    assert len(list(tmp_path.glob("*.state"))) <= 3 and len(list(tmp_path.iterdir())) <= 3


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "of other tokens", "of another model"])
def test_damaged_file_is_dropped_with_a_message(
    model: Any, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    write(tmp_path, model, b"key")
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-7])
    elif damage == "changed":
        content[-100] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "of other tokens":
        read(model, 1).save(path)
    else:
        read(PHASE2.model(num_heads=1).eval(), 2).save(path)
    cache = PrefixCache(1 << 24, files_of(tmp_path, model))
    with caplog.at_level(logging.WARNING):
        assert cache.find([b"shorter", b"key"]) == (0, None)
    assert "is damaged and will be removed" in caplog.text and path.name in caplog.text
    assert not path.exists()
    cache.close()


def test_folder_has_a_limit_and_drops_the_least_recently_used(model: Any, tmp_path: Path):
    write(tmp_path, model, b"a", b"b", b"c")
    paths = {key: files_of(tmp_path, model)._path(key) for key in (b"a", b"b", b"c")}
    size = paths[b"a"].stat().st_size
    for age, path in enumerate(reversed(paths.values())):
        os.utime(path, (1000 - age, 1000 - age))  # "a" is the oldest
    (tmp_path / "foreign.txt").write_text("x" * 10 * size)
    (tmp_path / "x.partial").write_bytes(b"x" * size)  # of a killed server
    os.utime(tmp_path / "x.partial", (1, 1))
    files = files_of(tmp_path, model, most_bytes=3 * size)
    assert files.load(b"a", 2) is not None
    files.store(b"d", read(model, 2))
    files.close()
    assert paths[b"a"].exists() and not paths[b"b"].exists() and paths[b"c"].exists()
    assert (tmp_path / "foreign.txt").exists() and not (tmp_path / "x.partial").exists()


def test_states_of_others_are_not_found(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Other weights, blocks and versions have other bits."""
    write(tmp_path, model, b"key")
    assert files_of(tmp_path, model).has(b"key")
    assert not files_of(tmp_path, model, block=2 * BLOCK).has(b"key")
    torch.manual_seed(1)
    assert not files_of(tmp_path, HYBRID.model()).has(b"key")
    monkeypatch.setattr(state_files, "__version__", "9.9")
    assert not files_of(tmp_path, model).has(b"key")


def test_state_beyond_the_limit_is_not_written(model: Any, tmp_path: Path):
    write(tmp_path, model, b"key", most_bytes=100)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_is_named(model: Any, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot keep states in"):
        files_of(tmp_path / "file", model)


def test_full_disk_loses_a_state_and_nothing_else(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    files = files_of(tmp_path, model)

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resolvent.models.state.write_tensors", fail)
    files.store(b"key", read(model, 2))
    files.close()
    monkeypatch.undo()
    write(tmp_path, model, b"other")
    assert [path.name for path in tmp_path.iterdir()] == [files._path(b"other").name]
    assert "could not be written: [Errno 28]" in caplog.text


def test_long_prompt_has_a_key_per_block():
    assert len(block_keys(tokens(4 * BLOCK, batch=1)[0].numpy(), BLOCK)) == 3


def test_unreadable_folder_is_an_empty_one(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    prompt = tokens(2 * BLOCK + 5, batch=1)
    engine = Engine(model, block=BLOCK, files=files_of(tmp_path, model))
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path.suffix == ".state":
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    engine.start()
    assert answer(engine, prompt)[1] == 0
    assert engine.alive
    engine.close()
    assert "cannot be read: [Errno 13]" in caplog.text


def test_file_that_cannot_be_removed_stops_no_eviction(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "a folder.state").mkdir()
    write(tmp_path, model, b"a")
    files, unlink = files_of(tmp_path, model), Path.unlink
    oldest, size = files._path(b"a"), files._path(b"a").stat().st_size
    os.utime(oldest, (1, 1))

    def refuse(path: Path, **options: bool) -> None:
        if path == oldest:
            raise PermissionError(13, "Permission denied")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    write(tmp_path, model, b"b", b"c", b"d", most_bytes=2 * size)
    files.close()
    assert {path.name for path in tmp_path.iterdir()} == {"a folder.state", oldest.name, files._path(b"d").name}
    assert "cannot be removed: [Errno 13]" in caplog.text
