"""Shards of tokens: what is written, found again, continued and checked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from resolvent.data import (
    EOT,
    TokenStream,
    build_tokenizer,
    encode_documents,
    load_documents,
    load_tokenizer,
    split_documents,
)
from resolvent.data import encoding as encoding_module
from resolvent.data.cache import tokenize
from resolvent.data.shard_writer import write_tokens
from resolvent.data.shards import HELD_OUT, TRAIN, StoredTokens, joined, open_tokens
from resolvent.data.text import Text
from resolvent.errors import DataError

KEY = "key"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 256 tokens, blocks of 64, batches of 200 characters, and a saved position every 300 tokens."""
    for module in ("shards", "shard_writer"):
        monkeypatch.setattr(f"resolvent.data.{module}.BLOCK_TOKENS", 64)
    monkeypatch.setattr("resolvent.data.shard_writer.SHARD_TOKENS", 256)
    monkeypatch.setattr("resolvent.data.shard_writer.SAVE_TOKENS", 300)
    monkeypatch.setattr("resolvent.data.shard_writer._BATCH_CHARACTERS", 200)


def sentences(count: int, seed: int = 0) -> str:
    random = Random(seed)
    words = ["river", "père", "№ 9", "stone", "日本", "don't", "  two", "1848,"]
    return "".join(" ".join(random.choices(words, k=random.randint(1, 12))) + "\n" for _ in range(count))


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    texts = [sentences(1 + number % 5, number) for number in range(60)] + [" \n", sentences(80, 7)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def tokenizer() -> Tokenizer:
    return build_tokenizer("bpe", [sentences(50)], vocab_size=300)


def make(folder: Path, path: Path, tokenizer: Tokenizer, fraction: float | None = 0.1) -> Path:
    write_tokens(folder, KEY, Text([str(path)]), tokenizer, fraction)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_stream(stream: TokenStream, expected: TokenStream) -> None:
    assert stream.tokens.dtype == expected.tokens.dtype and stream.tokens.shape == expected.tokens.shape
    assert np.array_equal(stream.tokens[:], expected.tokens[:])
    assert np.array_equal(stream.starts, expected.starts)
    assert np.array_equal(stream.byte_lengths, expected.byte_lengths)


def whole_words() -> Tokenizer:
    """A tokenizer whose tokens of a text are not those of its pieces."""
    vocabulary = {EOT: 0, "?": 1} | {word: number for number, word in enumerate(("river", "stone", "two"), start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([EOT])
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("fraction", [0.1, 0.45, None])
@pytest.mark.parametrize("spec", ["bytes", "bpe", "whole words"])
def test_shards_hold_the_tokens_of_the_split_documents(tmp_path, text_path, tokenizer, spec, fraction):
    chosen = {"bpe": tokenizer, "whole words": whole_words()}.get(spec) or build_tokenizer(spec, [])
    found = open_tokens(make(tmp_path / "tokens", text_path, chosen, fraction), chosen)
    documents = load_documents(text_path)
    parts = [documents] if fraction is None else split_documents(documents, fraction)
    assert list(found.streams) == [TRAIN, HELD_OUT][: len(parts)]
    for stream, texts in zip(found.streams.values(), parts, strict=True):
        assert_same_stream(stream, encode_documents(texts, chosen))


@pytest.mark.usefixtures("small_shards")
def test_a_long_text_is_split_and_encoded_in_pieces_as_the_whole(tmp_path, monkeypatch, tokenizer):
    path = tmp_path / "long.txt"
    path.write_text(sentences(400) + f"{EOT}\n" + sentences(300, 1) + "no end" * 50)
    monkeypatch.setattr("resolvent.data.pieces.evenly.__defaults__", (100,))
    pieces = list(Text([str(path)]).pieces())
    assert max(len(piece.text) for piece in pieces[:-1]) < 150
    found = open_tokens(make(tmp_path / "tokens", path, tokenizer), tokenizer)
    for stream, texts in zip(found.streams.values(), split_documents(load_documents(path)), strict=True):
        assert_same_stream(stream, encode_documents(texts, tokenizer))


@pytest.mark.usefixtures("small_shards")
def test_processes_write_what_one_process_writes(tmp_path, monkeypatch, text_path, tokenizer):
    make(tmp_path / "one", text_path, tokenizer)
    monkeypatch.setattr("resolvent.data.shard_writer._processes", lambda num_bytes: 2)
    make(tmp_path / "two", text_path, tokenizer)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_process_that_is_killed_is_an_error(monkeypatch, tokenizer):
    with encoding_module.Encoder(tokenizer, 1) as encoder:
        os.kill(encoder._processes[0]._process.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="a process that encodes text has ended"):
            list(encoder.encode([(0, ["text"])]))


def test_a_text_without_tokens_is_an_error_in_another_process_too():
    tokenizer = Tokenizer(models.WordLevel({EOT: 0}, unk_token="missing"))
    tokenizer.add_special_tokens([EOT])
    tokenizer.encode_special_tokens = True
    for processes in (0, 1):
        with encoding_module.Encoder(tokenizer, processes) as encoder, pytest.raises(DataError, match="cannot encode"):
            list(encoder.encode([(0, ["text"])]))


@pytest.mark.usefixtures("small_shards")
def test_any_slice_is_read_across_shards(tmp_path, text_path, tokenizer):
    stream = open_tokens(make(tmp_path / "tokens", text_path, tokenizer), tokenizer).streams[TRAIN]
    assert isinstance(stream.tokens, StoredTokens) and len(stream.tokens.files) > 4
    tokens, random = stream.tokens[:], Random(0)
    for _ in range(200):
        start, stop = random.randint(0, len(tokens)), random.randint(0, len(tokens) + 5)
        assert np.array_equal(stream.tokens[start:stop], tokens[start:stop])
    assert stream.tokens[-1] == tokens[-1] and np.array_equal(stream.tokens[[5, 900]], tokens[[5, 900]])


@pytest.mark.usefixtures("small_shards")
def test_streams_are_joined_at_their_separators(tmp_path, text_path, tokenizer):
    streams = [*open_tokens(make(tmp_path / "tokens", text_path, tokenizer), tokenizer).streams.values()]
    train, held_out = split_documents(load_documents(text_path))
    assert_same_stream(joined(streams), encode_documents(train + held_out, tokenizer))


class _Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("lifetimes", [[1], [3, 1, 2], [7, 2, 2, 2], [1] * 8, [15]])
def test_interrupted_work_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, text_path, tokenizer, lifetimes):
    expected = contents(make(tmp_path / "undisturbed", text_path, tokenizer))
    encode = encoding_module.Encoder.encode
    for lifetime in lifetimes:

        def until_killed(self, batches, lifetime=lifetime):
            for number, batch in enumerate(encode(self, batches)):
                if number == lifetime:
                    raise _Killed
                yield batch

        monkeypatch.setattr(encoding_module.Encoder, "encode", until_killed)
        with pytest.raises(_Killed):
            make(tmp_path / "tokens", text_path, tokenizer)
        assert not (tmp_path / "tokens").exists()
    monkeypatch.setattr(encoding_module.Encoder, "encode", encode)
    assert contents(make(tmp_path / "tokens", text_path, tokenizer)) == expected


@pytest.mark.usefixtures("small_shards")
def test_interrupted_work_is_not_repeated(tmp_path, monkeypatch, text_path, tokenizer):
    def kill(*_: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr("resolvent.data.shard_writer._write_index", kill)
        with pytest.raises(_Killed):
            make(tmp_path / "tokens", text_path, tokenizer)
    monkeypatch.setattr(encoding_module.Encoder, "_here", kill)
    make(tmp_path / "tokens", text_path, tokenizer)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
@pytest.mark.parametrize(
    "name", ["tokens.json", "train.starts", "train.bytes", "held-out.digests", "train-00002.tokens"]
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, text_path, tokenizer, name, change):
    folder = make(tmp_path / "tokens", text_path, tokenizer)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes(data if change == "flip" else data[: len(data) // 2])
    with pytest.raises(DataError, match=rf"{name}.*(remove the folder, and the text is tokenized again)"):
        open_tokens(folder, tokenizer).streams[TRAIN].tokens[:]


@pytest.mark.usefixtures("small_shards")
def test_a_block_is_checked_when_it_is_read_first(tmp_path, text_path, tokenizer):
    folder = make(tmp_path / "tokens", text_path, tokenizer)
    shard = folder / "train-00001.tokens"
    data = bytearray(shard.read_bytes())
    data[2 * 100] ^= 1
    shard.write_bytes(data)
    tokens = open_tokens(folder, tokenizer).streams[TRAIN].tokens
    assert len(tokens[: 256 + 64]) == 320, "blocks before it are as they were"
    with pytest.raises(DataError, match=r"train-00001.tokens is damaged: tokens from 64 on"):
        tokens[256 + 64 : 256 + 65]


@pytest.mark.usefixtures("small_shards")
def test_tokens_of_another_tokenizer_are_refused(tmp_path, text_path, tokenizer):
    folder = make(tmp_path / "tokens", text_path, tokenizer)
    with pytest.raises(DataError, match=rf"tokens holds tokens of another tokenizer .*train with --tokenizer {folder}"):
        open_tokens(folder, build_tokenizer("bytes", []))
    assert load_tokenizer(folder).to_str() == tokenizer.to_str()


def test_a_text_that_changes_between_two_readings_is_refused(tmp_path, text_path):
    text = Text([str(text_path)])
    held, _ = text.held_out_from(0.1)
    lines = text_path.read_text().splitlines()
    for changed in (lines[:-1], [*lines, lines[0]], [lines[0].replace('": "', '": "x'), *lines[1:]]):
        text_path.write_text("\n".join(changed))
        with pytest.raises(DataError, match="has changed while it was read"):
            list(text.fragments(held))


@pytest.mark.slow
def test_killed_twenty_times_the_shards_are_those_of_an_undisturbed_run(tmp_path):
    path = tmp_path / "text.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": sentences(40, number)}) + "\n" for number in range(12_000))
    script = (
        "import sys\n"
        "from resolvent.data import cache, shard_writer\n"
        "shard_writer.SHARD_TOKENS, shard_writer.SAVE_TOKENS = 1 << 19, 1 << 17\n"
        "cache.tokenize(sys.argv[1], sys.argv[2], tokenizer='gpt2')\n"
    )

    def start(out: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, path, out])

    assert start(tmp_path / "undisturbed").wait() == 0
    random, out = Random(0), tmp_path / "tokens"
    for _ in range(20):
        process, before = start(out), time.monotonic()
        while not (tmp_path / ".tokens.partial").exists() and time.monotonic() < before + 60:
            time.sleep(0.05)
        time.sleep(random.uniform(0.1, 1.5))
        process.kill()
        process.wait()
    assert not out.exists(), "every process was killed before the end"
    assert start(out).wait() == 0
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert tokenize(str(path), shutil.move(out, tmp_path / "moved"), tokenizer="gpt2").path == tmp_path / "moved"
