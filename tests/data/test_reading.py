import bz2
import codecs
import gzip
import json
import logging
import lzma
import os
import resource
import socket
import tarfile
import threading
from io import BytesIO
from pathlib import Path
from random import Random

import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from resolvent.data import EOT, load_documents, pieces, reading
from resolvent.data.content import HEAD_BYTES, NotText
from resolvent.data.reading import Reading, read_pieces, zstd
from resolvent.errors import DataError

ENCODINGS = {
    "UTF-8": ("utf-8", b""),
    "UTF-8 with a mark": ("utf-8", codecs.BOM_UTF8),
    "UTF-16 LE": ("utf-16-le", codecs.BOM_UTF16_LE),
    "UTF-16 BE": ("utf-16-be", codecs.BOM_UTF16_BE),
    "UTF-32 LE": ("utf-32-le", codecs.BOM_UTF32_LE),
    "UTF-32 BE": ("utf-32-be", codecs.BOM_UTF32_BE),
}
COMPRESSIONS = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
}
TEXTS = ["A line.\nAnother, número ‰.\n", "\U0001f600 {", "[1]\n\n\n", "a\tb,c\r\n", "文\u2028字", "x" * 100]


def encoded(text, encoding):
    codec, mark = ENCODINGS[encoding]
    return mark + text.encode(codec)


def read_documents(path, reading):
    """Yield the documents of one file, counted by `reading`."""
    parts = []
    for piece in read_pieces(path, reading):
        parts.append(reading.take(path, piece.text))
        if piece.last:
            yield "".join(parts)
            parts = []


def read(path, **options):
    return list(read_documents(path, Reading(**options)))


def only_file(folder, name, data):
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    path = folder / name
    path.write_bytes(data)
    return path


# --- encodings and compressions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4),
    records=st.booleans(),
    name=st.sampled_from(["a", "a.txt", "a.gz", "a.zip", "a.TXT.xz", "A.md"]),
)
@example(texts=TEXTS, records=True, name="a.txt")
def test_file_alone_equals_file_in_folder(tmp_path, encoding, compression, texts, records, name):
    if records:
        content, expected = "\n".join(json.dumps({"text": text}) for text in [*texts, "end"]), [*texts, "end"]
    else:
        content, expected = f"\n{EOT}\n".join(texts), [*(f"{text}\n" for text in texts[:-1]), texts[-1]]
    path = only_file(tmp_path / "folder", name, COMPRESSIONS[compression](encoded(content, encoding)))
    assert load_documents(path) == expected
    assert load_documents(path.parent) == expected
    assert load_documents([path, path.parent]) == expected * 2


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(st.sampled_from([*"ab\n\r", EOT, f"\n{EOT}\n", "é", "字", "\U0001f600", "\ufffd"])).map("".join),
    size=st.integers(1, 9),
)
@example(text=f"{EOT}\r\n{EOT}\r", size=1)
@example(text=f"a\n{EOT}", size=5)
def test_chunks_of_any_size_give_the_same_documents(tmp_path, encoding, text, size):
    path = only_file(tmp_path / "folder", "a.txt", encoded(text, encoding))
    whole = pieces._SEPARATOR.split(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_CHUNK_BYTES", size)
        patch.setattr(reading, "HEAD_BYTES", 12)
        assert read(path) == whole


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_invalid_sequences_are_counted_whatever_the_chunks(tmp_path, monkeypatch, encoding, size):
    codec, mark = ENCODINGS[encoding]
    half = {"utf-8": b"\xff", "utf-16-le": b"\0\xd8", "utf-16-be": b"\xd8\0"}.get(codec, b"\xff\xff\xff\xff")
    data = mark + b"".join(["a\ufffdb".encode(codec), half, "c字".encode(codec), half, "d".encode(codec)])
    monkeypatch.setattr(reading, "_CHUNK_BYTES", size)
    monkeypatch.setattr(reading, "HEAD_BYTES", 8)
    together = Reading()
    path = only_file(tmp_path / "folder", "a.txt", data)
    assert list(read_documents(path, together)) == ["a\ufffdb\ufffdc字\ufffdd"]
    assert together.repairs == {path: 2}


def test_compressed_parts_in_a_row_are_read_to_the_end(tmp_path):
    for name, compress in COMPRESSIONS.items():
        path = only_file(tmp_path / name, "a", compress(b"one\n") + compress(b"two\n"))
        assert read(path) == ["one\ntwo\n"]


def test_zstd_may_begin_with_a_frame_to_skip(tmp_path):
    frame = b"\x51\x2a\x4d\x18\x03\0\0\0abc"
    assert read(only_file(tmp_path / "a", "a", frame + zstd.compress(b"text"))) == ["text"]


def test_name_of_a_compression_does_not_decide(tmp_path):
    assert read(only_file(tmp_path / "a", "a.gz", b"as a browser left it")) == ["as a browser left it"]


# --- records ---------------------------------------------------------------------------------------------------------

LINES = '{"text": "one"}\n\n{"text": "two"}\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "a", "a.JSONL.zst"])
def test_json_lines_by_content(tmp_path, name):
    assert read(only_file(tmp_path / "a", name, LINES.encode())) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a"])
@pytest.mark.parametrize("space", ["", " ", "\n  "])
def test_json_array_by_content(tmp_path, name, space):
    text = f'{space}[{space}{{"text": "one", "n": [1]}}{space},{space}{{"text": "tw\\ud800o"}}{space}]{space}'
    together = Reading()
    path = only_file(tmp_path / "a", name, text.encode())
    assert list(read_documents(path, together)) == ["one", "tw\ufffdo"]
    assert together.repairs == {path: 1}


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ('[{"text": "x"},\n\n{"body": "x"}]', ":3: ", r"a field \"text\", got the fields \['body'\]"),
        ('[\n{"text": "x"}\n{"text": "y"}]', ":3: ", "not a JSON array of objects .*Expecting ','"),
        ('[{"text": "x"},\n{"text": ]', ":2: ", "not a JSON array of objects .*Expecting value"),
        ('[{"text": "x"},\n', ":2: ", "not a JSON array of objects .*Expecting value"),
        ('[{"text": "x"}]\n[]', ":2: ", "not a JSON array of objects .*Extra data"),
        ('[{"text": "x"},\n{"text": "", "a": ' + "[" * 10**5 + "]" * 10**5 + "}]", ":2: ", "nested too deeply"),
    ],
)
def test_damaged_json_array_names_the_line(tmp_path, text, place, message):
    with pytest.raises(DataError, match=f"a[.]json{place}.*{message}"):
        read(only_file(tmp_path / "a", "a.json", text.encode()))


@pytest.mark.parametrize(
    "text",
    [
        "{ a poem\nbegins }\n",
        '{"text": "x"}\nand then prose',
        '{"root": true}\n',
        '{"a": 1,\n "text": "x"}',
        "{}",
        "[a link](b)\n",
        "[section]\nkey = value\n",
        '[{"a": 1}]\n',
        "[" * 10**5,
        '{"a": ' * 10**5,
        "text, lies\nand so on,\n",
        "PAR1 is how Parquet begins",
        "BM, MZ, ID3, GIF8: a poem of signatures",
    ],
)
def test_text_that_looks_like_records_stays_text(tmp_path, text):
    assert read(only_file(tmp_path / "a", "a.txt", text.encode())) == [text]


def test_json_lines_end_where_prose_begins_beyond_the_sample(tmp_path):
    lines = ['{"text": "x"}'] * 100 + ["prose"]
    with pytest.raises(DataError, match=r"a\.txt:101: not a JSON object"):
        read(only_file(tmp_path / "a", "a.txt", "\n".join(lines).encode()))


def test_json_lines_without_the_field_are_refused(tmp_path):
    path = only_file(tmp_path / "a", "a.txt", b'{"body": "x"}\n{"body": "y"}\n')
    with pytest.raises(DataError, match=r"a\.txt:1: needs .* field \"text\", got the fields \['body'\].*--text-field"):
        read(path)
    assert read(path, text_field="body") == ["x", "y"]


def test_conversations_read_as_text_are_refused_with_the_format(tmp_path):
    path = only_file(tmp_path / "a", "a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* \['messages'\].*--format chat"):
        read(path)


@pytest.mark.parametrize("text", ['{\n"text": "x"\n}', '{"a": 1}', '{"a": 1}\n{"a": 2}', "[1]", "[{}]", "1", "", "x"])
def test_other_json_is_refused(tmp_path, text):
    with pytest.raises(NotText, match=r"a\.json is a JSON document .*jq.*--text-field"):
        read(only_file(tmp_path / "a", "a.json", text.encode()))


def test_first_line_may_be_longer_than_the_head(tmp_path):
    texts = ["x" * (3 * HEAD_BYTES), "y" * (3 << 20), "z"]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    assert read(only_file(tmp_path / "a", "a.txt", lines.encode())) == texts
    array = json.dumps([{"text": text} for text in texts])
    assert read(only_file(tmp_path / "a", "a.txt", array.encode())) == texts


def test_numbers_elsewhere_are_not_converted(tmp_path):
    line = '{"n": ' + "9" * 5000 + ', "f": 1e999999, "i": -Infinity, "text": "one"}\n'
    assert read(only_file(tmp_path / "a", "a.jsonl", line.encode())) == ["one"]


def test_field_may_have_any_name(tmp_path):
    path = only_file(tmp_path / "a", "a.jsonl", b'{"text": 1, "in halt": "x"}')
    assert load_documents(path, text_field="in halt") == ["x"]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz", "a.tab"])
def test_table_by_name_is_refused(tmp_path, name):
    with pytest.raises(NotText, match=r"table of separated values .*read_csv.*--text-field"):
        read(only_file(tmp_path / "a", name, b"id,text\n1,x\n"))


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("rows", [4, 9000])
def test_table_by_content_is_refused(tmp_path, delimiter, rows):
    table = f"id{delimiter}text\n" + "".join(f'{row}{delimiter}"a{delimiter}\nb"\n' for row in range(rows))
    with pytest.raises(NotText, match="table of separated values"):
        read(only_file(tmp_path / "a", "a.txt", table.encode()))
    assert read(only_file(tmp_path / "a", "a.txt", table.encode()), text_field="body") == [table]


def test_lines_of_json_arrays_are_no_table(tmp_path):
    lines = '["id", "text"]\n' * 9
    assert read(only_file(tmp_path / "a", "a.txt", lines.encode())) == [lines]


# --- Parquet ---------------------------------------------------------------------------------------------------------

WORDS = ["één", "two\n", "三", "één"]
KINDS = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.string_view(),
    pyarrow.binary(),
    pyarrow.large_binary(),
    pyarrow.binary_view(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
]


def write_parquet(path, **columns):
    path.parent.mkdir(exist_ok=True)
    try:
        parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowNotImplementedError as error:  # an old version reads what it cannot write
        pytest.skip(str(error))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.txt"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parquet_of_any_strings(tmp_path, kind, name):
    words = pyarrow.array([word.encode() for word in WORDS])
    if pyarrow.types.is_dictionary(kind):
        column = words.cast(kind.value_type).dictionary_encode().cast(kind)
    else:
        column = pyarrow.array([word.encode() if "binary" in str(kind) else word for word in WORDS], kind)
    path = write_parquet(tmp_path / "a" / name, n=list(range(4)), words=column)
    assert load_documents(path, text_field="words") == load_documents(path.parent, text_field="words") == WORDS


def test_parquet_of_strings_of_one_length(tmp_path):
    path = write_parquet(tmp_path / "a", text=pyarrow.array([b"abc", b"def"], pyarrow.binary(3)))
    assert read(path) == ["abc", "def"]


def test_parquet_null_names_the_row(tmp_path):
    path = write_parquet(tmp_path / "a", text=pyarrow.array(["x", "y", None]).dictionary_encode())
    with pytest.raises(DataError, match="holds a null in row 3"):
        read(path)


def test_parquet_compressed_as_a_whole_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a", text=["x"] * 100)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(NotText, match="decompress it: Parquet is compressed within"):
        read(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.gz", "a.zst", "a.txt"])
def test_damage_of_any_kind_is_an_error_or_other_text(tmp_path, name):
    """Parquet among it, of which pyarrow trusts the indices, and ends the process where sizes contradict each other."""
    lines, array = LINES * 5, json.dumps([{"text": "x\ud800", "n": [1, 2.5, None]}] * 5)
    whole = {
        "a.parquet": write_parquet(tmp_path / "p", text=WORDS * 20, n=list(range(80))).read_bytes(),
        "a.jsonl": lines.encode(),
        "a.json": array.encode(),
        "a.gz": gzip.compress(lines.encode()),
        "a.zst": zstd.compress(lines.encode()),
        "a.txt": encoded(lines, "UTF-16 LE"),
    }[name]
    random, messages = Random(name), []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            place = random.randrange(len(data))
            data[place : place + random.randint(0, 3)] = random.randbytes(random.randint(0, 3))
        try:
            load_documents(only_file(tmp_path / "a", name, data))
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert max(map(len, messages)) < 5000


@pytest.mark.parametrize("rows", [100_000, 3])
def test_parquet_that_repeats_a_long_text_takes_little_memory(tmp_path, rows):
    """A file of 700 bytes that holds 100 GB: no batch of it is ever whole in memory."""
    words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["x" * 1_000_000])
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": words}), path, store_schema=False, compression="zstd")
    together = Reading(most_bytes=5_000_000)
    if rows > 5:
        with pytest.raises(DataError, match=r"a\.parquet: the text takes more than 5,000,000 bytes of memory"):
            list(read_documents(path, together))
    else:
        assert [len(text) for text in read_documents(path, together)] == [1_000_000] * 3
    assert pyarrow.default_memory_pool().max_memory() < 500e6


# --- what is no regular file -----------------------------------------------------------------------------------------


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_link_to_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "what"), [(make_fifo, "a named pipe"), (make_socket, "a socket"), (make_link_to_device, "a device")]
)
def test_special_files_are_refused(tmp_path, monkeypatch, caplog, make, what):
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    make(Path("a"))
    with pytest.raises(NotText, match=f"a is {what}, not text: write its text into a file"):
        load_documents("a")
    Path("b.txt").write_text("text")
    assert load_documents(tmp_path) == ["text"]
    assert f"1 x {what}, as {tmp_path / 'a'}" in caplog.text


def test_file_that_becomes_a_pipe_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").write_text("text")
    monkeypatch.setattr(Path, "stat", lambda self: os.stat(tmp_path / "a"))
    with pytest.raises(DataError, match="it is no regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_invalid_file_name(name):
    with pytest.raises(DataError, match="cannot read"):
        load_documents(name)


def test_link_to_itself(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"cannot read .*symbolic links"):
        load_documents(tmp_path)


# --- memory ----------------------------------------------------------------------------------------------------------


def growing(compress, unit, times):
    return compress(unit * (1 << 17)) * times


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz", "zstd"])
@pytest.mark.parametrize("unit", [b"x", b"x\n", b'{"text": "x"}\n', b"[{\n", b"{"])
def test_decompression_bomb_stops_at_the_memory_limit(tmp_path, compression, unit):
    data = growing(COMPRESSIONS[compression], unit, 40)
    path = only_file(tmp_path / "a", "a", data)
    with pytest.raises(DataError, match=r"a/a: the text takes more than 4,000,000 bytes of memory, a quarter of what"):
        read(path, most_bytes=4_000_000)


def test_bomb_of_one_line_of_json(tmp_path):
    data = gzip.compress(b'{"text": "') + growing(gzip.compress, b"x", 40)
    with pytest.raises(DataError, match="takes more than 4,000,000 bytes of memory"):
        read(only_file(tmp_path / "a", "a.jsonl", data), most_bytes=4_000_000)


def test_bomb_of_zeros_is_no_text(tmp_path):
    path = only_file(tmp_path / "a", "a", growing(gzip.compress, b"\0", 4))
    with pytest.raises(NotText, match="binary data"):
        read(path)


def test_texts_share_the_memory(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text("x" * 1_000_000)
    together = Reading(most_bytes=2_500_000)
    assert [len(text) for name in "ab" for text in read_documents(tmp_path / name, together)] == [1_000_000] * 2
    with pytest.raises(DataError, match="c: the text takes more than"):
        list(read_documents(tmp_path / "c", together))


def test_text_larger_than_the_memory_is_named(tmp_path):
    path = only_file(tmp_path / "a", "a.txt.gz", growing(gzip.compress, b"A line of text.\n", 512))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (256 << 20), limits[1]))
    try:
        with pytest.raises(DataError, match=r"a\.txt\.gz: the text takes more than [0-9,]+ bytes .* more memory"):
            load_documents(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_allocation_that_fails_names_the_text(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    path = only_file(tmp_path / "a", "a.txt", b"text")
    monkeypatch.setattr(reading, "text_head", fail)
    with pytest.raises(DataError, match=r"a\.txt: the text does not fit into memory"):
        load_documents(path)


# --- what is no text -------------------------------------------------------------------------------------------------


def test_folder_leaves_out_what_is_refused_alone(tmp_path, caplog):
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    contents = {
        "a.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "b.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "c.tar.gz": gzip.compress(packed.getvalue()),
        "d.csv": b"a,b\n",
        "e.json": b'{"name": "x"}',
        "f.txt": b"text",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    for name in list(contents)[:-1]:
        with pytest.raises(NotText, match=name):
            load_documents(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert load_documents(tmp_path) == ["text"]
    (record,) = caplog.records
    assert f"Left out of {tmp_path}, as not text: 2 x an image (png), as {tmp_path / 'a.png'}; " in record.message
    for what in ("1 x a tar archive", "1 x a table", "1 x a JSON document"):
        assert what in record.message


def test_reading_in_another_thread_is_the_same(tmp_path):
    path, found = only_file(tmp_path / "a", "a.txt", b"text"), []
    thread = threading.Thread(target=lambda: found.extend(load_documents(path)))
    thread.start()
    thread.join()
    assert found == ["text"]
