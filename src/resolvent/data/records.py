"""Read documents from one field of records: JSON Lines, a JSON array, Parquet. Other fields are ignored."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from resolvent.data.content import NotText
from resolvent.errors import DataError
from resolvent.files import shown

SAMPLED_LINES = 100
"""Lines that must be JSON objects if the file name does not name JSON Lines."""

_BATCH_BYTES = 1 << 24
_MOST_ROWS = 1024

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_SPACE = re.compile(r"[^ \t\r\n]")


class _Number:
    """A JSON number that stays a string: Python refuses to convert thousands of digits."""

    def __init__(self, literal: str) -> None:
        self.literal = literal

    def __repr__(self) -> str:
        return self.literal


_DECODER = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_Number)


def lines_of(chunks: Iterable[str]) -> Iterator[str]:
    """Split text that comes in chunks into lines without line ends."""
    rest: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        rest.append(first)
        if others:
            yield "".join(rest)
            *whole, last = others
            yield from whole
            rest = [last]
    yield "".join(rest)


def sampled_objects(lines: Iterable[str]) -> list[dict[str, object]]:
    """Return the objects in the first `SAMPLED_LINES` lines that are not blank, or none if one holds anything else."""
    found: list[dict[str, object]] = []
    for line in lines:
        if not line.strip():
            continue
        try:
            value = _DECODER.decode(line) if line.lstrip().startswith("{") else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            return []
        found.append(value)
        if len(found) == SAMPLED_LINES:
            break
    return found


def looks_like_json_array(text: str, text_field: str) -> bool:
    """Return True for a JSON array whose first value is an object with the field."""
    try:
        value, _ = _DECODER.raw_decode(text, _skip_space(text, _after(text, 0, "[")))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and text_field in value


def json_lines(
    lines: Iterable[str], path: Path, text_field: str, count: Callable[[int], None], *, structured: bool = False
) -> Iterator[str]:
    """Yield the documents of JSON Lines.

    Args:
        lines: lines of the file.
        path: path of the file, for errors.
        text_field: the field that holds the text.
        structured: True to take any value of the field, as JSON.
        count: called with the number of lone surrogates in a document. JSON can express half of a surrogate pair, which
            no encoding of text can hold; U+FFFD replaces it.

    Raises:
        DataError: a line that is no object with that field; it names the line.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number}: not a JSON object ({_fault(error)}); repair or remove the line"
                ) from error
            yield _document(record, f"{path}:{number}", text_field, count, structured)


def json_array(
    text: str, path: Path, text_field: str, count: Callable[[int], None], *, structured: bool = False
) -> Iterator[str]:
    """Yield the documents of a JSON array of objects; arguments and errors are those of `json_lines`."""
    position, line, seen = 0, 1, 0
    try:
        position = _after(text, 0, "[")
        while text[(position := _skip_space(text, position)) : position + 1] != "]":
            line, seen = line + text.count("\n", seen, position), position
            record, position = _DECODER.raw_decode(text, position)
            yield _document(record, f"{path}:{line}", text_field, count, structured)
            position = _skip_space(text, position)
            if text[position : position + 1] != "]":
                position = _after(text, position, ",")
        if (after := _skip_space(text, position + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, after)
    except (json.JSONDecodeError, RecursionError) as error:
        line += text.count("\n", seen, getattr(error, "pos", seen))
        raise DataError(f"{path}:{line}: not a JSON array of objects ({_fault(error)}); repair it") from error


def refuse_json(path: Path) -> NoReturn:
    """Refuse a JSON file that is neither JSON Lines nor an array of objects with the text.

    Raises:
        NotText: always.
    """
    raise NotText(
        path,
        "a JSON document that holds no list of texts",
        "write one object per line, as `jq -c '.[]'` does for an array, and name the field with the text by "
        "--text-field",
    )


def parquet_documents(path: Path, text_field: str, decode: Callable[[bytes], str]) -> Iterator[str]:
    """Yield the documents of a Parquet file, one per row; the strings may have any Arrow type.

    Args:
        path: the file.
        text_field: the column that holds the text.
        decode: decodes the bytes of a row: Arrow does not check that strings are valid UTF-8.

    Raises:
        DataError: no such column, a row without text, a damaged file, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'resolvent[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = {field.name: field.type for field in file.schema_arrow}
            rows_at_once = _rows_at_once(file.metadata)
        if not _holds_strings(columns.get(text_field)):
            held = ", ".join(f"{name}: {kind}" for name, kind in columns.items())
            raise DataError(
                f'{path}: needs a column "{text_field}" of strings, got columns {_cut(held)}; name the one with the '
                "text by --text-field"
            )
        # As a dictionary: a text that is repeated a million times takes memory once.
        with parquet.ParquetFile(path, read_dictionary=[text_field], pre_buffer=False) as file:
            batches = file.iter_batches(batch_size=rows_at_once, columns=[text_field])
            values = (data for batch in batches for data in _values(batch.column(0)))
            for row, data in enumerate(values, start=1):
                if data is None:
                    raise DataError(
                        f'{path}: the column "{text_field}" holds a null in row {row}; remove the rows without text'
                    )
                yield decode(data)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # UnicodeDecodeError: in the names of columns
        if isinstance(error, MemoryError):
            raise
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error


def _holds_strings(kind: Any) -> bool:
    from pyarrow import types

    if kind is None:
        return False
    if types.is_dictionary(kind):
        return _holds_strings(kind.value_type)
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(types, f"is_{test}")(kind) for test in tests)


def _rows_at_once(metadata: Any) -> int:
    """Return the number of rows that take some megabytes, from the sizes in the file.

    The sizes of single columns are not read: pyarrow aborts the process where those of a damaged file contradict each
    other.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [_BATCH_BYTES * group.num_rows // max(1, group.total_byte_size) for group in groups]
    return max(1, min([_MOST_ROWS, *rows]))


def _values(column: Any) -> Iterator[bytes | None]:
    import pyarrow

    if not pyarrow.types.is_dictionary(column.type):
        yield from (value.as_py() for value in column.cast(pyarrow.large_binary()))
        return
    words = column.dictionary.cast(pyarrow.large_binary())
    for index in column.indices.to_pylist():
        if index is not None and not 0 <= index < len(words):  # pyarrow does not check
            raise pyarrow.ArrowInvalid(f"text {index} of {len(words)}")
        yield None if index is None else words[index].as_py()


def _skip_space(text: str, position: int) -> int:
    found = _NO_SPACE.search(text, position)
    return found.start() if found else len(text)


def _after(text: str, position: int, mark: str) -> int:
    """Return the position after a JSON delimiter, which must come next."""
    at = _skip_space(text, position)
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, at)
    return at + 1


def _fault(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _document(record: object, place: str, text_field: str, count: Callable[[int], None], structured: bool) -> str:
    if not isinstance(record, dict) or text_field not in record:
        held = f"the fields {shown(sorted(record)[:20])}" if isinstance(record, dict) else f"a {_kind(record)}"
        remedy = "name the field with the text by --text-field"
        if isinstance(record, dict) and "messages" in record:
            remedy = "conversations are read with --format chat"
        raise DataError(f'{place}: needs an object with a field "{text_field}", got {held}; {remedy}')
    value = record[text_field]
    if structured:
        value = json.dumps(value, ensure_ascii=False, default=_as_python)
    if not isinstance(value, str):
        raise DataError(f'{place}: the field "{text_field}" must be a string, got {value!r:.50}')
    document, lone_surrogates = _LONE_SURROGATE.subn("\ufffd", value)
    if lone_surrogates:
        count(lone_surrogates)
    return document


def _as_python(number: _Number) -> int | float:
    """Return a number; infinity for an integer with thousands of digits."""
    try:
        return int(number.literal)
    except ValueError:
        return float(number.literal)


def _kind(value: object) -> str:
    return "number" if isinstance(value, _Number) else type(value).__name__


def _cut(text: str) -> str:
    """Return a text for a message, truncated after 500 characters."""
    return text if len(text) <= 500 else f"{text[:500]}... ({len(text):,} characters)"
