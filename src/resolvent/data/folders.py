"""Find the files of a folder of text, without the files of runs and caches."""

import os
from collections.abc import Iterator
from pathlib import Path

from resolvent.data.content import NotText
from resolvent.files import partial_name
from resolvent.manifest import CONFIG, MANIFEST, RUN_FILE, WEIGHTS

_CACHE_NAME = "__pycache__"
CACHE_TAG = "CACHEDIR.TAG"
TOKENS_FILE = "tokens.json"
"""The index of a folder of tokens."""


def files_below(folder: Path) -> tuple[list[Path], list[NotText]]:
    """Find the files below a folder, in sorted order.

    Hidden files, hidden folders and caches (`__pycache__` and folders with a `CACHEDIR.TAG`) are skipped without
    notice. Run folders, folders of saved models and links to folders are left out and reported.

    Returns:
        The files, and the paths that were left out.

    Raises:
        NotText: the folder itself is that of a run or a model.
        OSError: a folder that cannot be read.
    """
    files: list[Path] = []
    left_out: list[NotText] = []
    for place, folders, names in os.walk(folder, onerror=_raise):
        here = Path(place)
        if what := _output(here):
            output = NotText(here, what, "name the text that it was trained on, or other text")
            if here == folder:
                raise output
            left_out.append(output)
            folders.clear()
            continue
        folders[:] = [name for name in folders if not _is_cache(here / name)]
        left_out += _links(here, folders)
        files += [here / name for name in names if not name.startswith(".")]
    return sorted(files), left_out


def _output(folder: Path) -> str | None:
    """Return the kind of a folder that this library wrote, or None."""
    if ((folder / MANIFEST).exists() and (folder / RUN_FILE).exists()) or partial_name(folder / MANIFEST).exists():
        return "the folder of a run"
    if all((folder / name).exists() for name in (CONFIG, WEIGHTS)):
        return "the folder of a model"
    if (folder / TOKENS_FILE).exists():
        return "a folder of tokens"
    return None


def _is_cache(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name == _CACHE_NAME or (folder / CACHE_TAG).exists()


def _links(here: Path, folders: list[str]) -> Iterator[NotText]:
    for name in folders:
        if (here / name).is_symlink():
            yield NotText(here / name, "a link to a folder", "name the folder that it leads to")


def _raise(error: OSError) -> None:
    raise error
