"""Data sets of the library `datasets`: local folders and names of its hub, in the place of files.

`hf:NAME_OR_PATH[,split=train][,field=text][,name=CONFIGURATION][,revision=REVISION][,streaming]`
"""

import hashlib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from resolvent.data.folders import files_below
from resolvent.data.pieces import Piece, evenly
from resolvent.data.reading import Reading, faults_of
from resolvent.data.split import DocumentKey, share_warning
from resolvent.data.text import Fragment, Plan, Text
from resolvent.errors import ConfigError, DataError

PREFIX = "hf:"
_OPTIONS = ("split", "field", "name", "revision")
_ROWS_AT_ONCE = 256
_SAVED = ("state.json", "dataset_dict.json")
"""Files of what `save_to_disk` writes: of one split, and of several."""


def text_of(paths: list[str] | None, text_field: str = "text") -> Text:
    """Return the text that paths name: files and folders, or one data set.

    Raises:
        ConfigError: a data set with an unknown option.
    """
    if paths is not None and len(paths) == 1 and paths[0].startswith(PREFIX):
        return HubText(paths[0], text_field)
    return Text(paths, text_field)


class HubText(Text):
    """The rows of a data set, each a document.

    Args:
        spec: `hf:` with name and options.
        text_field: the column with the text, unless the options name it.

    Raises:
        ConfigError: an unknown option.
    """

    def __init__(self, spec: str, text_field: str = "text") -> None:
        place, *options = spec.removeprefix(PREFIX).split(",")
        self.streaming = "streaming" in options
        pairs = [option.partition("=") for option in options if option != "streaming"]
        values = {name: value for name, _, value in pairs}
        if not place or (unknown := [option for option in values if option not in _OPTIONS or not values[option]]):
            raise ConfigError(
                f"{spec} is no data set: write hf:NAME_OR_PATH[,split=train][,field=text][,name=CONFIGURATION]"
                f"[,revision=REVISION][,streaming]{', without ' + ', '.join(unknown) if place else ''}"
            )
        super().__init__([spec], values.get("field", text_field))
        self._place, self._split = place, values.get("split", "train")
        self._version = {"name": values.get("name"), "revision": values.get("revision")}

    def files(self) -> list[Path]:
        """Return the files of a local folder, which tell whether it has changed; none of the hub."""
        folder = Path(self._place)
        if not folder.exists():
            return []
        with faults_of(folder):
            return files_below(folder)[0] if folder.is_dir() else [folder]

    def _check(self, path: Path) -> None:
        """Take any file: the library knows what it reads."""

    @cached_property
    def digest(self) -> str | None:
        """A hash of all texts; of a stream, of its name alone, or None for that of local files."""
        digest = hashlib.sha256()
        if self.streaming:
            digest.update(repr((self._place, self._split, self._version)).encode())
            return None if self.files() else digest.hexdigest()
        for piece in self._texts(self._dataset):
            digest.update(f"{len(piece)} {piece}".encode())
        return digest.hexdigest()

    def pieces(self, reading: Reading | None = None) -> Iterator[Piece]:
        """Yield all documents in pieces, the blank ones among them.

        Raises:
            DataError: it is a stream.
        """
        if self.streaming:
            raise DataError(f"{self.name} is read once, which serves neither bpe nor evaluation: leave out streaming")
        return evenly(Piece(text, True) for text in self._texts(self._dataset))

    def plan(self, fraction: float | None) -> Plan:
        """Return how the text is split and read: a stream in one go, each row by its hash alone."""
        return _StreamPlan(self, fraction) if self.streaming else super().plan(fraction)

    @property
    def num_bytes(self) -> int | None:
        """Bytes of all documents; None of a stream."""
        return None if self.streaming else super().num_bytes

    @cached_property
    def _dataset(self) -> Any:
        return self.load()

    def load(self) -> Any:
        """Return the data set, with the one column.

        Raises:
            DataError: the library is missing, or the data set, its split or its column.
        """
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise DataError(f"reading {self.name} needs datasets: pip install 'resolvent[datasets]'") from error
        with self._faults():
            if any((Path(self._place) / name).exists() for name in _SAVED):
                found = datasets.load_from_disk(self._place)
                found = found[self._split] if isinstance(found, datasets.DatasetDict) else found
                found = found.to_iterable_dataset() if self.streaming else found
            else:
                options = dict(split=self._split, streaming=self.streaming, **self._version)
                found = datasets.load_dataset(self._place, **options)
            columns = found.column_names
        if columns is not None and self.text_field not in columns:
            raise DataError(
                f'{self.name} has no column "{self.text_field}", but {", ".join(columns)}: name the one with text as '
                f"{PREFIX}{self._place},field=NAME"
            )
        return found.select_columns([self.text_field])

    def _texts(self, dataset: Any) -> Iterator[str]:
        with self._faults():
            row = 0
            for batch in dataset.iter(_ROWS_AT_ONCE):
                for text in batch[self.text_field]:
                    yield self.checked(text, row := row + 1)

    def checked(self, text: object, row: int) -> str:
        """Return the text of a row.

        Raises:
            DataError: the value is no text.
        """
        if not isinstance(text, str):
            raise DataError(f'{self.name}: the column "{self.text_field}" holds {text!r:.50} in row {row}, and no text')
        return text

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn the errors of the library, which are of many kinds, into one that names the data set.

        Raises:
            DataError: in their place.
        """
        try:
            yield
        except (DataError, MemoryError):
            raise
        except Exception as error:
            raise DataError(
                f"cannot read {self.name}: {error}; check its name, its split and, for the hub, the network"
            ) from error


class _StreamPlan(Plan):
    """A stream that is read once, from a saved position on.

    Nothing is known of it before. So a row is held out if the hash of its text is below the share.
    """

    def __init__(self, text: HubText, fraction: float | None) -> None:
        self.text, self.fraction, self.warnings = text, fraction, []
        self._dataset: Any = None

    def fragments(self, *, cut: bool, done: int, state: Any) -> Iterator[Fragment]:
        """Yield the rows from a position on, each whole."""
        self._dataset = self.text.load()
        if state is not None:
            self._dataset.load_state_dict(state)
        threshold = int((self.fraction or 0.0) * 2**64)
        with self.text._faults():
            for row, record in enumerate(self._dataset, start=done + 1):
                text = self.text.checked(record[self.text.text_field], row)
                if text and not text.isspace():
                    key, data = DocumentKey(), text.encode()
                    key.update(data)
                    yield Fragment(key.value() < threshold, len(data), text)

    def state(self) -> Any:
        """Return the position after the rows that were yielded."""
        return self._dataset.state_dict()

    def closing_warnings(self, held_out: int, total: int) -> list[str]:
        """Return a warning where the rows that are held out miss their share."""
        if self.fraction is None:
            return []
        warning = share_warning(np.array([total]), np.array([total - held_out]), self.fraction)
        return [] if warning is None else [warning]
