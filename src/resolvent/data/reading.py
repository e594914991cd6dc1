"""Read the documents of one file, whose format is recognised by its content."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from resolvent.data.content import (
    HEAD_BYTES,
    TABLE_SUFFIXES,
    Head,
    NotText,
    compression_of,
    content_suffix,
    decode,
    looks_like_table,
    refuse_table,
    text_head,
)
from resolvent.data.pieces import Piece, evenly, separated
from resolvent.data.records import (
    json_array,
    json_lines,
    lines_of,
    looks_like_json_array,
    parquet_documents,
    refuse_json,
    sampled_objects,
)
from resolvent.errors import DataError
from resolvent.files import open_regular
from resolvent.memory import machine_memory
from resolvent.wording import counted

_CHUNK_BYTES = 1 << 20
_DECOMPRESSORS: dict[str | None, Callable[[BinaryIO], io.BufferedIOBase | BinaryIO]] = {
    None: lambda file: file,
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": zstd.ZstdFile,
}
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = b"PAR1"
_SPECIAL = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISDIR: "a folder",
}


@dataclass
class Reading:
    """State that is shared by the files of one text.

    Attributes:
        text_field: the field or column of records that holds their text.
        structured: True to take any value of the field of JSON records, as JSON.
        most_bytes: limit of the memory of all documents: a quarter of the free memory; tokens need the rest.
        taken: memory of the documents so far.
        repairs: number of invalid sequences that were replaced, by file.
        warnings: about the text, for whoever asked for it.
    """

    text_field: str = "text"
    structured: bool = False
    most_bytes: int = field(default_factory=lambda: machine_memory().available // 4)
    taken: int = 0
    repairs: Counter[Path] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    def take(self, path: Path, text: str) -> str:
        """Count the memory of a text that is kept, and return the text.

        Raises:
            DataError: the limit is exceeded.
        """
        self.taken += sys.getsizeof(text)
        self.check(path)
        return text

    def check(self, path: Path, more: int = 0) -> None:
        """Refuse a text that exceeds the limit.

        Raises:
            DataError: names the file.
        """
        if self.taken + more > self.most_bytes:
            raise DataError(
                f"{path}: the text takes more than {self.most_bytes:,} bytes of memory, a quarter of what is free: "
                "give a part of it, or use a machine with more memory"
            )

    def repaired(self, path: Path, count: int) -> None:
        """Count invalid sequences that were replaced."""
        if count:
            self.repairs[path] += count

    def report_repairs(self) -> None:
        """Add a warning that counts the invalid sequences that were replaced, if there were any."""
        if self.repairs:
            file, count = self.repairs.most_common(1)[0]
            self.warnings.append(
                f"Replaced {counted(self.repairs.total(), 'invalid sequence')} by U+FFFD in "
                f"{counted(len(self.repairs), 'file')}, {count} of them in {file}"
            )


def read_pieces(path: Path, reading: Reading) -> Iterator[Piece]:
    """Yield the documents of one file in pieces, which take little memory however long a plain text is.

    A record (a line of JSON Lines, a row of Parquet) and a JSON array as a whole are held in memory while they are cut
    into pieces.

    The content decides the format, and the name where the rules say so. The file may be compressed with gzip, bzip2, xz
    or zstd. It is UTF-8, or it has the byte order mark of UTF-8, UTF-16 or UTF-32. The first rule that applies:

    1. A name that ends in `.csv`, `.tsv` or `.tab` is a table, which is refused.
    2. A name that ends in `.jsonl` or `.ndjson` is JSON Lines: a document in the field `text_field` of each line.
    3. A file that begins with `{` is JSON Lines if each of its first 100 lines that are not blank is a JSON object and
       one of them has the field. Without the field, two such lines are JSON Lines too, and the missing field is an
       error, unless the name ends in `.json`.
    4. A file that begins with `[` is a JSON array if its first value is an object that has the field: a document in the
       field of each object.
    5. Any other name that ends in `.json` is refused.
    6. A file whose first line names a column like the field, and whose first five records have equally many columns, is
       a table, which is refused.
    7. Anything else is plain text: lines that are exactly `<|endoftext|>` separate documents.

    The suffix of a compression does not count: `.jsonl.zst` is `.jsonl`. A binary file that begins with `PAR1` is
    Parquet: a document in each row of the column `text_field`.

    Args:
        path: the file.
        reading: the state of the text; it is updated.

    Returns:
        Pieces of about `PIECE_CHARACTERS`, cut where `resolvent.data.pieces` cuts: their tokens are those of the text.

    Raises:
        NotText: before the first document: the file is not text, or no regular file.
        DataError: the file cannot be read, is damaged, or exceeds the limit of memory.
    """
    with faults_of(path), _open(path) as file:
        if _is_parquet(file, path):
            texts = parquet_documents(path, reading.text_field, lambda data: _decoded(data, path, reading))
            yield from evenly(_whole(texts, path, reading))
            return
        source, compressed = _decompressed(file)
        yield from evenly(_text_pieces(source, path, reading, compressed=compressed))


def read_text(file: BinaryIO, path: Path) -> str:
    """Return an open file, which may be a pipe, as one text.

    It may be compressed and encoded as in `read_pieces`, and a file that is not text is refused as there. Text is
    taken as it is: there are no documents, records or tables in it.

    Args:
        file: the file.
        path: its name, for errors.

    Raises:
        NotText: the file is not text.
        DataError: the file cannot be read, is damaged, or exceeds the limit of memory.
    """
    reading, data = Reading(), bytearray()
    with faults_of(path):
        while part := file.read(_CHUNK_BYTES):
            data += part
            reading.check(path, len(data))
        source, compressed = _decompressed(io.BytesIO(data))
        _, chunks = _decoded_chunks(source, path, reading, compressed=compressed)
        return "".join(reading.take(path, chunk) for chunk in chunks)


def check_beginning(path: Path) -> None:
    """Refuse a file whose beginning shows that it is not text.

    Raises:
        NotText: the file is not text, or no regular file.
        DataError: the file cannot be read.
    """
    with faults_of(path), _open(path) as file:
        if not _is_parquet(file, path):
            source, compressed = _decompressed(file)
            text_head(path, source.read(HEAD_BYTES), compressed=compressed)


@contextmanager
def faults_of(path: Path) -> Generator[None, None, None]:
    """Convert the errors of all readers to a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{path}: the text does not fit into memory: give a part of it, or use a machine with more memory"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read {path}: {reason}; check that it exists, is readable and is not damaged"
        ) from error


def _open(path: Path) -> BinaryIO:
    """Open a regular file. Reading a pipe, a device or a socket could block or never end.

    Raises:
        NotText: it is no regular file.
        OSError: it cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL character in the name
        raise OSError(str(error)) from error
    if not stat.S_ISREG(mode):
        what = next((name for test, name in _SPECIAL.items() if test(mode)), "no regular file")
        raise NotText(path, what, "write its text into a file, and name that")
    return open_regular(path)


def _decompressed(file: BinaryIO) -> tuple[io.BufferedIOBase | BinaryIO, bool]:
    """Return the content of a file from its beginning, and True if the file is compressed."""
    compression = compression_of(file.read(HEAD_BYTES))
    file.seek(0)
    return _DECOMPRESSORS[compression](file), compression is not None


def _is_parquet(file: BinaryIO, path: Path) -> bool:
    """Return True for Parquet, damaged or not, and rewind the file."""
    if file.read(len(_PARQUET)) != _PARQUET:
        file.seek(0)
        return False
    rest = file.read(HEAD_BYTES)
    file.seek(-len(_PARQUET), os.SEEK_END)
    ending = file.read(len(_PARQUET))
    file.seek(0)
    return ending == _PARQUET or b"\0" in rest or path.suffix.lower() == ".parquet"


def _decoded(data: bytes, path: Path, reading: Reading) -> str:
    text, invalid = decode(codecs.getincrementaldecoder("utf-8-sig")(), data, final=True)
    reading.repaired(path, invalid)
    return text


def _whole(texts: Iterable[str], path: Path, reading: Reading) -> Iterator[Piece]:
    """Yield texts that are in memory whole, each of which the limit of memory allows."""
    for text in texts:
        reading.check(path, sys.getsizeof(text))
        yield Piece(text, True)


def _text_pieces(
    source: io.BufferedIOBase | BinaryIO, path: Path, reading: Reading, *, compressed: bool
) -> Iterator[Piece]:
    head, chunks = _decoded_chunks(source, path, reading, compressed=compressed)
    suffix, beginning = content_suffix(path), head.text.lstrip()
    if suffix in TABLE_SUFFIXES:
        refuse_table(path)
    if suffix in _JSON_LINES:
        yield from _json_lines(chunks, path, reading)
    elif beginning.startswith("{"):
        yield from _maybe_json_lines(chunks, path, reading)
    elif beginning.startswith("[") and (suffix == ".json" or beginning[1:].lstrip().startswith("{")):
        yield from _maybe_json_array(chunks, path, reading)
    elif suffix == ".json":
        refuse_json(path)
    elif looks_like_table(head.text, reading.text_field, whole=head.whole):
        refuse_table(path)
    else:
        yield from separated(chunks)


def _decoded_chunks(
    source: io.BufferedIOBase | BinaryIO, path: Path, reading: Reading, *, compressed: bool
) -> tuple[Head, Iterator[str]]:
    """Return the beginning of a text, and all of it in chunks."""
    start = source.read(HEAD_BYTES)
    head = text_head(path, start, compressed=compressed)
    data = chain([start[head.mark :]], iter(lambda: source.read(_CHUNK_BYTES), b""))
    return head, _decode_chunks(data, head.encoding, path, reading)


def _json_lines(chunks: Iterable[str], path: Path, reading: Reading) -> Iterator[Piece]:
    lines = lines_of(_bounded_lines(chunks, path, reading))
    repaired = partial(reading.repaired, path)
    documents = json_lines(lines, path, reading.text_field, repaired, structured=reading.structured)
    return _whole(documents, path, reading)


def _maybe_json_lines(chunks: Iterator[str], path: Path, reading: Reading) -> Iterator[Piece]:
    """Return the documents of a file that begins with a brace."""
    seen: list[str] = []
    objects = sampled_objects(lines_of(_remembered(chunks, seen, path, reading)))
    has_field = any(reading.text_field in value for value in objects)
    is_json = content_suffix(path) == ".json"
    chunks = chain(seen, chunks)
    if has_field or (len(objects) > 1 and not is_json):
        return _json_lines(chunks, path, reading)
    if is_json:
        refuse_json(path)
    return separated(chunks)


def _maybe_json_array(chunks: Iterator[str], path: Path, reading: Reading) -> Iterator[Piece]:
    """Return the documents of a file that begins with a bracket."""
    seen: list[str] = []
    text = "".join(_remembered(chunks, seen, path, reading))
    if looks_like_json_array(text, reading.text_field):
        seen.clear()
        repaired = partial(reading.repaired, path)
        documents = json_array(text, path, reading.text_field, repaired, structured=reading.structured)
        return (Piece(document, True) for document in documents)
    if content_suffix(path) == ".json":
        refuse_json(path)
    return separated(seen)


def _decode_chunks(data: Iterable[bytes], encoding: str, path: Path, reading: Reading) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    for part, final in chain(((part, False) for part in data), [(b"", True)]):
        text, invalid = decode(decoder, part, final=final)
        reading.repaired(path, invalid)
        yield text


def _remembered(chunks: Iterator[str], seen: list[str], path: Path, reading: Reading) -> Iterator[str]:
    """Yield chunks and keep them in `seen`, so that they can be read again."""
    held = 0
    for chunk in chunks:
        seen.append(chunk)
        held += sys.getsizeof(chunk)
        reading.check(path, held)
        yield chunk


def _bounded_lines(chunks: Iterable[str], path: Path, reading: Reading) -> Iterator[str]:
    """Yield chunks of lines; no line may exceed the limit of memory."""
    line = 0
    for chunk in chunks:
        line = sys.getsizeof(chunk) + (0 if "\n" in chunk else line)
        reading.check(path, line)
        yield chunk
