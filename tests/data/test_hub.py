"""Data sets of the library `datasets`, from local folders."""

import json
from pathlib import Path

import numpy as np
import pytest

from resolvent.data import build_tokenizer, encode_documents, split_documents
from resolvent.data.cache import TokenCache, tokenize
from resolvent.data.encoding import Encoder
from resolvent.data.hub import HubText, text_of
from resolvent.data.shards import HELD_OUT, TRAIN
from resolvent.data.text import Text
from resolvent.errors import ConfigError, DataError

pytest.importorskip("datasets")

BYTES = build_tokenizer("bytes", [])
ROWS = [f"Row {number} of a data set, which says père.\n" * (1 + number % 3) for number in range(400)]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "rows"
    path.mkdir()
    rows = [*ROWS[:200], "  \n", *ROWS[200:]]
    (path / "train.jsonl").write_text("".join(json.dumps({"body": row, "n": 1}) + "\n" for row in rows))
    (path / "test.jsonl").write_text(json.dumps({"body": "a row of the test split", "n": 2}) + "\n")
    return path


def test_rows_are_split_and_encoded_as_documents(folder: Path, tmp_path: Path):
    found = TokenCache(tmp_path / "cache").tokens(text_of([f"hf:{folder},field=body"]), BYTES, 0.1)
    for stream, texts in zip(found.streams.values(), split_documents(ROWS), strict=True):
        assert np.array_equal(stream.tokens[:], encode_documents(texts, BYTES).tokens)


def test_a_split_can_be_named_and_a_saved_data_set_read(folder: Path, tmp_path: Path):
    import datasets

    text = HubText(f"hf:{folder},split=test,field=body")
    assert [piece.text for piece in text.pieces()] == ["a row of the test split"]
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "saved")
    assert [piece.text for piece in HubText(f"hf:{tmp_path / 'saved'}").pieces()] == ROWS
    splits = {"train": datasets.Dataset.from_dict({"text": ROWS[:3]})}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert [piece.text for piece in HubText(f"hf:{tmp_path / 'several'}").pieces()] == ROWS[:3]


def test_a_data_set_is_tokenized_once_and_again_when_it_changes(folder: Path, tmp_path: Path):
    cache, spec = TokenCache(tmp_path / "cache"), f"hf:{folder},field=body"
    first = cache.tokens(text_of([spec]), BYTES, 0.1).path
    assert cache.tokens(text_of([spec]), BYTES, 0.1).path == first
    with open(folder / "train.jsonl", "a") as file:
        file.write(json.dumps({"body": "one more", "n": 3}) + "\n")
    assert cache.tokens(text_of([spec]), BYTES, 0.1).path != first


def test_a_stream_is_read_once_and_split_by_hash(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loads: list[HubText] = []
    load = HubText.load
    monkeypatch.setattr(HubText, "load", lambda self: loads.append(self) or load(self))
    monkeypatch.setattr(Text, "survey", property(lambda self: pytest.fail("the stream is surveyed")))
    found = TokenCache(tmp_path / "cache").tokens(text_of([f"hf:{folder},field=body,streaming"]), BYTES, 0.2)
    train, held_out = found.streams[TRAIN], found.streams[HELD_OUT]
    assert len(loads) == 1 and train.num_documents + held_out.num_documents == len(ROWS)
    assert held_out.num_bytes / (train.num_bytes + held_out.num_bytes) == pytest.approx(0.2, abs=0.04)
    texts = BYTES.decode(held_out.tokens[:].tolist(), skip_special_tokens=False).split("<|endoftext|>")[1:-1]
    assert texts == [row for row in ROWS if row in set(texts)]


class _Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("lifetimes", [[3], [5, 2, 4]])
def test_a_stream_goes_on_from_its_saved_position(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lifetimes: list[int]
):
    monkeypatch.setattr("resolvent.data.shard_writer._BATCH_CHARACTERS", 1000)
    monkeypatch.setattr("resolvent.data.shard_writer.SAVE_TOKENS", 1500)
    spec, rows = f"hf:{folder},streaming", []
    checked, encode = HubText.checked, Encoder.encode
    monkeypatch.setattr(HubText, "checked", lambda self, text, row: rows.append(row) or checked(self, text, row))
    expected = tokenize(spec, tmp_path / "undisturbed", text_field="body").path
    rows.clear()
    for lifetime in lifetimes:

        def until_killed(self, batches, lifetime=lifetime):
            for number, batch in enumerate(encode(self, batches)):
                if number == lifetime:
                    raise _Killed
                yield batch

        monkeypatch.setattr(Encoder, "encode", until_killed)
        with pytest.raises(_Killed):
            tokenize(spec, tmp_path / "tokens", text_field="body")
    monkeypatch.setattr(Encoder, "encode", encode)
    found = tokenize(spec, tmp_path / "tokens", text_field="body").path
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }
    assert len(rows) < len(ROWS) * 1.3, "rows before the saved position are not read again"


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("hf:{},field=text", r'has no column "text", but .*body.*field=NAME'),
        ("hf:{},field=n", r'the column "n" holds 1 in row 1, and no text'),
        ("hf:{},split=nope,field=body", "cannot read hf:.*nope.*; check its name, its split"),
        ("hf:{}/missing", "cannot read hf:.*missing.*; check its name"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, spec: str, fault: str):
    with pytest.raises(DataError, match=fault):
        list(HubText(spec.format(folder)).pieces())


@pytest.mark.parametrize("spec", ["hf:", "hf:a,shuffle=1", "hf:a,split=", "hf:a,b"])
def test_a_name_with_unknown_options_is_refused(spec: str):
    with pytest.raises(ConfigError, match="is no data set: write hf:NAME_OR_PATH"):
        HubText(spec)


def test_a_stream_serves_no_bpe(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="is read once, which serves neither bpe nor evaluation: leave out streaming"):
        tokenize(f"hf:{folder},field=body,streaming", tmp_path / "out", tokenizer="bpe")


def test_the_library_is_an_extra(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs datasets: pip install 'resolvent\[datasets\]'"):
        list(HubText(f"hf:{folder}").pieces())
