"""Recognise files by their first bytes: compression, encoding, and files that are not text."""

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import filetype

from resolvent.errors import DataError

HEAD_BYTES = 1 << 16
"""First bytes of a file, decompressed, by which its format is recognised."""

_COMPRESSIONS = {
    "gzip": (b"\x1f\x8b",),
    "bzip2": tuple(b"BZh%d" % level + block for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
    "xz": (b"\xfd7zXZ\0",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))),
}
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_BYTE_ORDER_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_MOST_INVALID = 32
"""Invalid sequences that the head of a text may hold in addition to a tenth of its characters."""

TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
_CSV_RECORDS = 5

_UNPACK = "unpack it, and name the folder with its files"
_EXTRACT = "save or extract its text as a plain text file first"
_NAMES = {  # by signature: formats that `filetype` does not know, and formats without NUL bytes
    b"%PDF-": ("a PDF document", "extract its text first, as `pdftotext` does"),
    b"{\\rtf": ("an RTF document", _EXTRACT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Office document", _EXTRACT),
    b"ARROW1\0\0": ("an Arrow file", "write it as Parquet"),
    b"FEA1": ("a Feather file", "write it as Parquet"),
    b"ORC": ("an ORC file", "write it as Parquet"),
    b"Obj\x01": ("an Avro file", "write it as Parquet"),
    b"PAR1": ("Parquet that is compressed as a whole", "decompress it: Parquet is compressed within"),
    b"PARE": ("an encrypted Parquet file", "decrypt it first"),
    b"\x93NUMPY": ("a NumPy array", ""),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", ""),
    b"GGUF": ("a model in GGUF", ""),
    b"\x80\x02": ("a Python pickle", ""),
    b"\x80\x03": ("a Python pickle", ""),
    b"\x80\x04": ("a Python pickle", ""),
    b"\x80\x05": ("a Python pickle", ""),
}
_WITHOUT_NUL = (b"%PDF-", b"{\\rtf")
_ARCHIVES = {"zip": "ZIP", "tar": "tar", "7z": "7-Zip", "rar": "RAR", "cab": "CAB", "deb": "Debian", "rpm": "RPM"}
_MEDIA = {"image": "an image", "audio": "a sound recording", "video": "a video"}
_COMPRESSED = {"lz4", "lz", "lzo", "Z", "br", "gz", "bz2", "xz", "zst"}


class NotText(DataError):
    """Error of a file that is not text. A single file is refused; a file within a folder is left out.

    Attributes:
        path: of the file.
        what: its format, for messages.
    """

    def __init__(self, path: Path, what: str, remedy: str) -> None:
        super().__init__(f"{path} is {what}, not text: {remedy or 'name files that hold text'}")
        self.path, self.what = path, what


class Head(NamedTuple):
    """The beginning of a text file.

    Attributes:
        encoding: the codec that decodes it.
        mark: bytes of its byte order mark.
        text: the beginning, decoded, without a last character that was cut off.
        whole: whether the beginning is all of the file.
    """

    encoding: str
    mark: int
    text: str
    whole: bool


def compression_of(head: bytes) -> str | None:
    """Return the name of the compression whose signature the file begins with, or None."""
    for name, signatures in _COMPRESSIONS.items():
        if head.startswith(signatures):
            return name
    return None


def content_suffix(path: Path) -> str:
    """Return the suffix of a file name in lower case, without the suffix of a compression: `.jsonl` of `A.JSONL.gz`."""
    name = path.name.lower()
    for suffix in _COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def text_head(path: Path, head: bytes, *, compressed: bool) -> Head:
    """Recognise a text by its first bytes, decompressed.

    A byte order mark decides the encoding; without one it is UTF-8. A file is not text if it holds NUL characters, if
    more than a tenth of its characters (and more than 32) are invalid in that encoding, or if it begins as a PDF or RTF
    document.

    Args:
        path: of the file.
        head: the first `HEAD_BYTES` of the file, or a whole shorter file.
        compressed: whether the file is compressed.

    Raises:
        NotText: the file is not text.
    """
    if compressed and (inner := compression_of(head)):
        raise NotText(path, f"compressed twice (with {inner} inside)", "decompress it once")
    encoding, mark = next(((e, len(m)) for m, e in _BYTE_ORDER_MARKS if head.startswith(m)), ("utf-8", 0))
    text, invalid = decode(codecs.getincrementaldecoder(encoding)(), head[mark:])
    if "\0" in text or invalid > _MOST_INVALID + len(text) // 10 or head.startswith(_WITHOUT_NUL):
        raise NotText(path, *_name(head, text, invalid))
    return Head(encoding, mark, text, len(head) < HEAD_BYTES)


def decode(decoder: codecs.IncrementalDecoder, data: bytes, *, final: bool = False) -> tuple[str, int]:
    """Decode bytes, with U+FFFD for every invalid sequence.

    Args:
        decoder: a decoder with `errors="strict"`; the setting is restored.
        data: the next bytes.
        final: whether `data` ends the text.

    Returns:
        The text, and how many invalid sequences were replaced.
    """
    state = decoder.getstate()
    try:
        return decoder.decode(data, final), 0
    except UnicodeDecodeError:
        texts = []
        for decoder.errors in ("ignore", "replace"):
            decoder.setstate(state)
            texts.append(decoder.decode(data, final))
        decoder.errors = "strict"
        valid, repaired = texts
        return repaired, repaired.count("\ufffd") - valid.count("\ufffd")


def looks_like_table(text: str, text_field: str, *, whole: bool) -> bool:
    """Return True for a table of separated values.

    The first line must name a column like the field with the text, and the first five records must have equally many
    columns, separated by commas, tabs, semicolons or bars.

    Args:
        text: the beginning of a text.
        text_field: the field that holds the text of records.
        whole: whether the beginning is the whole text.
    """
    return any(_is_table(text, delimiter, text_field, whole) for delimiter in ",\t;|")


def refuse_table(path: Path) -> NoReturn:
    """Refuse a table.

    Raises:
        NotText: always.
    """
    raise NotText(
        path,
        "a table of separated values (CSV)",
        f"make it Parquet, as pandas.read_csv({path.name!r}).to_parquet('{path.stem}.parquet') does, and name the "
        "column with the text by --text-field",
    )


def _is_table(text: str, delimiter: str, text_field: str, whole: bool) -> bool:
    first, _, _ = text.partition("\n")
    if delimiter not in first or text_field not in first:
        return False
    try:
        records = list(_records(text if whole else text[: text.rfind("\n") + 1], delimiter))
    except csv.Error:
        return False
    records = records if whole else records[:-1]  # of which the last may be cut off
    columns = [cell.strip() for cell in records[0]] if records else []
    return text_field in columns and len(records) >= _CSV_RECORDS and {len(columns)} == {*map(len, records)}


def _records(text: str, delimiter: str) -> Iterator[list[str]]:
    return (record for record in csv.reader(io.StringIO(text), delimiter=delimiter) if record)


def _name(head: bytes, text: str, invalid: int) -> tuple[str, str]:
    """Return the format of a file that is not text, and the remedy."""
    for signature, named in _NAMES.items():
        if head.startswith(signature):
            return named
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return "a model or tensors in safetensors", ""
    if (kind := filetype.guess(head)) is not None:
        return _library_name(kind.mime, kind.extension)
    if "\0" not in text:
        remedy = "if it is text in another encoding, convert it: iconv -f ENCODING -t UTF-8"
        return (
            f"neither UTF-8 nor known otherwise ({invalid:,} invalid sequences in its first {len(head):,} bytes)",
            remedy,
        )
    for order, high, low in (("LE", head[1::2], head[::2]), ("BE", head[::2], head[1::2])):
        if high.count(0) > 0.9 * len(high) and low.count(0) < 0.1 * len(low):
            return "UTF-16 without a byte order mark", f"convert it: iconv -f UTF-16{order} -t UTF-8"
    return "binary data (it holds NUL bytes)", ""


def _library_name(mime: str, extension: str) -> tuple[str, str]:
    if extension in _ARCHIVES:
        return f"a {_ARCHIVES[extension]} archive", _UNPACK
    if extension in _COMPRESSED:
        return f"compressed ({extension})", "decompress it first; gzip, bzip2, xz and zstd are read as they are"
    if (medium := _MEDIA.get(mime.partition("/")[0])) is not None:
        return f"{medium} ({extension})", ""
    if "officedocument" in mime or "opendocument" in mime or extension in ("epub", "ps", "doc", "xls", "ppt"):
        return f"a document (.{extension})", _EXTRACT
    return f"a file of type {mime}", ""
