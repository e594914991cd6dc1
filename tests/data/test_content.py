import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from resolvent.data.content import NotText, compression_of, content_suffix, looks_like_table, text_head

PATH = Path("folder", "a.txt")


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "application/epub+zip" if name == "mimetype" else "text")
    return file.getvalue()


def saved(save, *values):
    file = io.BytesIO()
    save(file, *values)
    return file.getvalue()


BINARIES = {
    "a ZIP archive": zipped("a.txt"),
    "a document (.docx)": zipped("[Content_Types].xml", "_rels/.rels", "word/document.xml"),
    "a document (.epub)": zipped("mimetype"),
    "a tar archive": b"a.txt".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0"),
    "a 7-Zip archive": b"7z\xbc\xaf\x27\x1c\0\4" + bytes(30),
    "a RAR archive": b"Rar!\x1a\x07\1\0" + bytes(30),
    "compressed (lz4)": b"\x04\x22\x4d\x18" + bytes(30),
    "a PDF document": b"%PDF-1.7\n1 0 obj\n",
    "an RTF document": b"{\\rtf1\\ansi text}",
    "an Office document": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(30),
    "an image (png)": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(20),
    "an image (jpg)": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(20),
    "a sound recording (mp3)": b"ID3\3\0" + bytes(30),
    "a model or tensors in safetensors": safetensors.numpy.save({"a": np.zeros(3)}),
    "a model in GGUF": b"GGUF\3\0\0\0" + bytes(30),
    "a NumPy array": saved(np.save, np.zeros(3)),
    "an Arrow file": b"ARROW1\0\0" + bytes(30),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(30),
    "a file of type application/x-sqlite3": b"SQLite format 3\0" + bytes(30),
    "a file of type application/x-executable": b"\x7fELF" + bytes(60),
    "UTF-16 without a byte order mark": "text of any kind".encode("utf-16-le"),
    "binary data (it holds NUL bytes)": b"some text" + bytes(3),
}


@pytest.mark.parametrize("what", BINARIES)
@pytest.mark.parametrize("compressed", [False, True])
def test_binary_is_named_with_the_remedy(what, compressed):
    with pytest.raises(NotText) as refused:
        text_head(PATH, BINARIES[what], compressed=compressed)
    assert refused.value.what == what
    assert str(refused.value).startswith(f"{PATH} is {what}, not text: ")
    assert len(str(refused.value).rpartition(": ")[2]) > 10


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_is_named(protocol):
    with pytest.raises(NotText, match="a Python pickle"):
        text_head(PATH, pickle.dumps({"a": list(range(300))}, protocol), compressed=False)


def test_checkpoint_of_torch_is_an_archive():
    data = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, data)
    with pytest.raises(NotText, match="ZIP archive"):
        text_head(PATH, data.getvalue(), compressed=False)


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf16_without_a_mark_is_converted_first(order):
    with pytest.raises(NotText, match=f"iconv -f UTF-16{order.upper()} -t UTF-8"):
        text_head(PATH, "Some text.".encode(f"utf-16-{order}"), compressed=False)


@pytest.mark.parametrize(
    ("text", "encoding"), [("Текст на русском языке. " * 20, "cp1251"), ("日本語の文章。" * 30, "shift-jis")]
)
def test_text_in_another_encoding_is_refused(text, encoding):
    with pytest.raises(NotText, match=r"neither UTF-8 nor known otherwise .*iconv -f ENCODING -t UTF-8"):
        text_head(PATH, text.encode(encoding), compressed=False)


def test_few_letters_in_another_encoding_are_repaired():
    text = "Un jour d'été, nous sommes montés à la montagne pour y manger du pain. " * 20
    head = text_head(PATH, text.encode("latin-1"), compressed=False)
    assert head.text == text.encode().decode("ascii", "replace").replace("\ufffd\ufffd", "\ufffd")


@pytest.mark.parametrize("data", [b"", b"x", b"\xff", b"\xef\xbb", "\ufeff".encode(), b"\xff\xfe", b"\xff\xfe\0\0"])
def test_short_files_are_text(data):
    text_head(PATH, data, compressed=False)


def test_utf32_is_not_taken_for_utf16():
    assert text_head(PATH, b"\xff\xfe\0\0" + "text".encode("utf-32-le"), compressed=False).text == "text"


@pytest.mark.parametrize("text", ["BZh is no compression", "BZh91AY&S", "(\xb5/", "7z", "PK", "\x1f"])
def test_beginning_of_a_signature_is_no_compression(text):
    assert compression_of(text.encode()) is None


def test_compressed_twice_is_refused():
    with pytest.raises(NotText, match=r"compressed twice \(with xz inside\), not text: decompress it once"):
        text_head(PATH, b"\xfd7zXZ\0", compressed=True)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.txt", ".txt"),
        ("A.JSONL.GZ", ".jsonl"),
        ("a.b.csv.zst", ".csv"),
        ("a.gz", ""),
        ("a", ""),
        ("a.jsonl.txt", ".txt"),
    ],
)
def test_suffix_without_that_of_a_compression(name, suffix):
    assert content_suffix(Path(name)) == suffix


@pytest.mark.parametrize(
    "text",
    [
        "text, and more,\nof prose, with\none, comma\nin, each\nof five, lines\n",
        "id,text\n1,x\n2,y\n3,z,\n4,w\n",
        'id,text\n1,"x\n2,y\n3,z\n4,w\n',
        "text\nx\ny\nz\nw\n",
        "id,text\n",
        "",
    ],
)
def test_prose_with_commas_is_no_table(text):
    assert not looks_like_table(text, "text", whole=True)


def test_last_record_of_a_beginning_may_be_cut_off():
    rows = "id,text\n" + "1,x\n" * 5
    for cut in (rows + '2,"y', rows + "2", rows):
        assert looks_like_table(cut, "text", whole=False)


def test_numbers_before_a_brace_are_no_tensors():
    head = text_head(PATH, b"12345678{ a text }", compressed=False)
    assert head.text == "12345678{ a text }"
    with pytest.raises(NotText, match="safetensors"):
        text_head(PATH, struct.pack("<Q", 64) + b"{}", compressed=False)
