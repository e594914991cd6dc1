"""The cache of tokens: which text and tokenizer it serves, and who writes to it."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from resolvent.data import build_tokenizer, load_documents, split_documents
from resolvent.data.cache import TokenCache, tokenize
from resolvent.data.shards import HELD_OUT, TRAIN
from resolvent.data.text import Text
from resolvent.errors import ConfigError, DataError

BYTES = build_tokenizer("bytes", [])
LINES = [f"Line {number} of a text, which is of some length.\n" for number in range(200)]


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    """A text that was written some time ago."""
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line, "title": line.upper()}) + "\n" for line in LINES))
    os.utime(path, (1e9, 1e9))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "cache")


def entries(cache: TokenCache) -> list[str]:
    return sorted(path.name for path in cache.path.glob("tokens-*"))


def tokens(cache: TokenCache, path: Path, fraction: float | None = 0.1, field: str = "text") -> Path:
    return cache.tokens(Text([str(path)], field), BYTES, fraction).path


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the text is read")

    monkeypatch.setattr(Text, "pieces", fail)


def test_the_same_text_is_tokenized_once_wherever_it_is(cache, text_path, tmp_path, monkeypatch):
    found = tokens(cache, text_path)
    forbid_reading(monkeypatch)
    moved = text_path.rename(tmp_path / "elsewhere.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "copy.jsonl").write_bytes(moved.read_bytes())
    assert tokens(cache, moved) == tokens(TokenCache(cache.path), moved) == tokens(cache, tmp_path / "folder") == found


def test_what_tokens_depend_on_makes_an_entry(cache, text_path, tmp_path):
    found = {tokens(cache, text_path), tokens(cache, text_path, 0.2), tokens(cache, text_path, None)}
    found.add(tokens(cache, text_path, field="title"))
    found.add(cache.tokens(Text([str(text_path)]), build_tokenizer("bpe", LINES, 270), 0.1).path)
    (tmp_path / "text.txt").write_bytes(text_path.read_bytes())
    found.add(tokens(cache, tmp_path / "text.txt"))  # JSON Lines by its first lines, and not by its name
    assert len(found) == len(entries(cache)) == 6


def test_a_change_that_keeps_size_and_time_is_seen(cache, text_path):
    before, status = tokens(cache, text_path), text_path.stat()
    data = text_path.read_bytes()
    text_path.write_bytes(data.replace(b"Line 7 ", b"Line 8 "))
    os.utime(text_path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert text_path.stat().st_size == status.st_size and text_path.stat().st_mtime_ns == status.st_mtime_ns
    assert tokens(cache, text_path) != before


def test_the_contents_of_settled_files_are_not_read_again(cache, text_path, monkeypatch):
    monkeypatch.setattr("resolvent.data.cache.time.time", lambda: 1e12)
    found = tokens(cache, text_path)
    monkeypatch.setattr(Text, "file_digest", lambda self: pytest.fail("the files are read"))
    assert tokens(cache, text_path) == found


def test_a_text_that_is_being_written_is_refused(cache, text_path, monkeypatch):
    pieces = Text.pieces

    def written_to(self, reading=None):
        yield from pieces(self, reading)
        os.utime(text_path)

    monkeypatch.setattr(Text, "pieces", written_to)
    with pytest.raises(DataError, match=r"text.jsonl has changed while it was read: start again when nothing writes"):
        tokens(cache, text_path)
    assert not entries(cache)


def test_of_several_processes_one_encodes(cache, text_path, monkeypatch):
    """Threads stand for processes: a lock is of an open file."""
    calls, inside = [], threading.Event()
    original = TokenCache._key.__globals__["write_tokens"]

    def slowly(*arguments):
        calls.append(arguments)
        inside.set()
        waiting.wait(5)
        original(*arguments)

    monkeypatch.setattr("resolvent.data.cache.write_tokens", slowly)
    waiting, found = threading.Event(), []
    first = threading.Thread(target=lambda: found.append(tokens(cache, text_path)))
    first.start()
    inside.wait(5)
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere)
        monkeypatch.setattr(console, "print", lambda *_: waiting.set())
        second = threading.Thread(target=lambda: found.append(tokens(TokenCache(cache.path, console), text_path)))
        second.start()
        first.join()
        second.join()
    assert waiting.is_set() and len(calls) == 1 and len(set(found)) == 1 == len(found) - 1
    assert not [*cache.path.glob(".*.lock")]


def test_a_bpe_is_trained_once_on_what_is_not_held_out(cache, text_path, monkeypatch):
    text = Text([str(text_path)])
    train, _ = split_documents(load_documents(text_path))
    trained = cache.tokenizer([text], 0.1, 300)
    assert trained.to_str() == build_tokenizer("bpe", train, 300).to_str()
    forbid_reading(monkeypatch)
    again = TokenCache(cache.path).tokenizer([Text([str(text_path)])], 0.1, 300)
    assert again.to_str() == trained.to_str()


def test_a_bpe_of_a_large_text_is_trained_on_an_even_sample(cache, text_path, monkeypatch):
    samples = []
    monkeypatch.setattr("resolvent.data.cache.SAMPLE_BYTES", 1000)
    monkeypatch.setattr(
        "resolvent.data.cache.build_tokenizer", lambda spec, sample, size: samples.append(sample) or BYTES
    )
    cache.tokenizer([Text([str(text_path)])], None, 300)
    (sample,) = samples
    assert 1000 <= sum(map(len, sample)) < 1000 + max(map(len, LINES))
    numbers = [LINES.index(text) for text in sample]
    gaps = np.diff(numbers)
    assert min(gaps) >= 8 and max(gaps) <= 10 and numbers[-1] > 180


def test_a_folder_that_is_no_cache_is_refused(tmp_path, text_path):
    with pytest.raises(DataError, match=r"here holds other files than those of a cache.*--cache or the variable RES"):
        TokenCache(text_path.parent)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to .*cache: .*name another cache with --cache or the variable"):
        TokenCache(tmp_path / "file" / "cache").tokens(Text([str(text_path)]), BYTES, 0.1)


def test_a_full_disk_is_an_error_that_names_the_cache(cache, text_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resolvent.data.cache.write_tokens", full)
    with pytest.raises(
        DataError, match=r"cannot write to .*cache: .*No space left.*make room on its disk, or name ano"
    ):
        tokens(cache, text_path)


def test_the_cache_of_a_text_is_no_text(cache, text_path):
    tokens(cache, text_path)
    cache.path.rename(text_path.parent / "cache")
    assert len(load_documents(text_path.parent)) == len(LINES)


def test_warnings_about_a_text_are_those_of_its_first_reading(cache, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"broken \xff text")
    first = cache.tokens(Text([str(tmp_path / "a.txt")]), BYTES, None)
    forbid_reading(monkeypatch)
    again = cache.tokens(Text([str(tmp_path / "a.txt")]), BYTES, None)
    assert first.warnings == again.warnings
    assert "Replaced 1 invalid sequence by" in first.warnings[0]


# --- folders of tokens ----------------------------------------------------------------------------------------------


def test_tokenize_makes_a_folder_once(tmp_path, text_path, monkeypatch):
    out = tmp_path / "out"
    made = tokenize(str(text_path), out, tokenizer="bpe", vocab_size=300, validation_fraction=0.2)
    assert made.fraction == 0.2 and made.streams[HELD_OUT].num_bytes > 1000 and len(made.streams[TRAIN].starts) > 100
    monkeypatch.setattr("resolvent.data.cache.write_tokens", lambda *_: pytest.fail("it is written again"))
    assert tokenize(str(text_path), out, tokenizer="bpe", vocab_size=300, validation_fraction=0.2).path == out
    with pytest.raises(ConfigError, match="out exists, and does not hold the tokens of this text: choose another one"):
        tokenize(str(text_path), out, validation_fraction=0.2)


def test_tokenize_leaves_other_folders_alone(tmp_path, text_path):
    with pytest.raises(ConfigError, match="here exists, and does not hold"):
        tokenize(str(text_path), text_path.parent)
    assert [path.name for path in text_path.parent.iterdir()] == ["text.jsonl"]
