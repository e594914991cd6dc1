"""A cache of tokenized texts, which runs, resumed runs and processes share.

A folder of tokens is known by a hash of the files' contents, the field of records, the share held out, and the
tokenizer. So it serves the same text at another path, and no other text. A `bpe` is known by the text and its size.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from resolvent.data.folders import CACHE_TAG
from resolvent.data.hub import text_of
from resolvent.data.shard_writer import Advance, write_tokens
from resolvent.data.shards import INDEX, TokenFolder, open_tokens, tokenizer_digest
from resolvent.data.stream import byte_length
from resolvent.data.text import Text
from resolvent.data.tokenization import build_tokenizer, load_tokenizer
from resolvent.errors import CheckpointError, ConfigError, DataError
from resolvent.files import own_directory, read_json, refuse_link, remove, write_output
from resolvent.manifest import is_sealed, sealed

VARIABLE = "RESOLVENT_CACHE"
FOLDER_NAME = "token-cache"
"""The default cache's name, beside the run folder."""
FORMAT = 1
"""Part of every key: of what is made of a text, and how."""
SAMPLE_BYTES = 1 << 26
"""Most text that a `bpe` is trained on."""
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# Tokens of texts, made by resolvent"
_TAG = f"{_SIGNATURE}, and made again if removed.\n"
_SETTLED_SECONDS = 2.0
"""Age from which on the times of a file tell whether it has changed since."""
_PATIENCE = 0.2


class TokenCache:
    """A cache in a folder.

    Args:
        path: of the folder; made where missing, when there is something to keep.
        console: where to say what takes long; progress bars are shown if it is a terminal.

    Raises:
        DataError: the folder cannot be used.
    """

    def __init__(self, path: Path, console: Console | None = None) -> None:
        self.path, self.console = path, console or Console(quiet=True)
        with self._writing():
            others = [] if is_cache(path) or not path.exists() else list(path.iterdir())
        if any(not other.name.startswith(f".{CACHE_TAG}") for other in others):
            raise DataError(
                f"{path} holds other files than those of a cache: name a new or empty folder with --cache or the "
                f"variable {VARIABLE}"
            )

    def tokenizer(self, texts: list[Text], fraction: float | None, vocab_size: int) -> Tokenizer:
        """Return the `bpe` of texts, trained if need be on what is not held out of them, or on an even sample of that.

        Args:
            texts: the texts, each of which is split.
            fraction: the share of the bytes of each to hold out; None for nothing.
            vocab_size: tokens, the separator included.

        Raises:
            DataError: text or cache that cannot be used.
        """
        keys = [self._key("text", text) for text in texts]
        path = self.path / f"bpe-{_hash([FORMAT, keys, fraction, vocab_size])[:32]}.json"
        if path.exists():
            return load_tokenizer(path)
        with self._writing(), self._locked(path.name):
            if path.exists():
                return load_tokenizer(path)
            self.console.print(f"Training a tokenizer with {vocab_size:,} tokens")
            tokenizer = build_tokenizer("bpe", list(_sample(texts, fraction)), vocab_size)
            write_output(path, tokenizer.to_str().encode())
            return tokenizer

    def tokens(self, text: Text, tokenizer: Tokenizer, fraction: float | None) -> TokenFolder:
        """Return the tokens of a text, encoded if need be.

        Of several processes one encodes, and the others wait.

        Args:
            text: the text.
            tokenizer: encodes it.
            fraction: the share of the bytes to hold out; None for nothing.

        Raises:
            DataError: text or cache that cannot be used.
        """
        key = self._key("tokens", text, fraction, tokenizer_digest(tokenizer))
        folder = self.path / f"tokens-{key}"
        if not folder.exists():
            with self._writing(), self._locked(folder.name):
                if not folder.exists():
                    _write(folder, key, text, tokenizer, fraction, self.console)
        return open_tokens(folder, tokenizer)

    def _key(self, kind: str, text: Text, *rest: object) -> str:
        return _key(kind, self._source(text), text, *rest)

    def _source(self, text: Text) -> str:
        """Return the digest of a text's files, which is kept for as long as nothing tells that they have changed."""
        if (digest := text.digest) is not None:
            return digest
        files = text.files()
        identities = _identities(files)
        path = self.path / "sources" / f"{_hash(identities)}.json"
        try:
            record = read_json(path)
            if is_sealed(record):
                return record["sha256_of_files"]
        except CheckpointError:
            pass
        digest = text.file_digest()
        newest = max((max(identity[2:4]) for identity in identities), default=0)
        settled = time.time() - newest / 1e9 > _SETTLED_SECONDS
        if settled and (not self.path.exists() or os.access(self.path, os.W_OK)):  # others may have made it
            with self._writing():
                self._make()
                write_output(path, json.dumps(sealed({"sha256_of_files": digest})).encode())
        return digest

    def _make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not is_cache(self.path):
            write_output(self.path / CACHE_TAG, _TAG.encode())
        own_directory(self.path / "sources")

    def _writing(self) -> AbstractContextManager[None]:
        return _writing(self.path, f"name another cache with --cache or the variable {VARIABLE}")

    def _locked(self, name: str) -> AbstractContextManager[None]:
        self._make()
        return _locked(self.path / f".{name}.lock", self.console)


def tokenize(
    data: str | list[str] | None,
    out: str | Path,
    *,
    tokenizer: str = "bytes",
    vocab_size: int = 8192,
    text_field: str = "text",
    validation_fraction: float | None = 0.1,
    console: Console | None = None,
) -> TokenFolder:
    """Tokenize a text into a folder that runs learn from, here or elsewhere, with `--data` in the place of the text.

    If the process is killed, the same call goes on with what it left.

    Args:
        data: paths of files and folders; None for the default corpus.
        out: the folder, which must not exist.
        tokenizer: as of `build_tokenizer`; the folder is one of those that it takes.
        vocab_size: tokens of `bpe`.
        text_field: the field of records that holds their text.
        validation_fraction: the share of the bytes to hold out; None for nothing, as text to validate on is.
        console: where to show progress.

    Raises:
        ConfigError: the folder is in use, or the vocabulary too small.
        DataError: text or tokenizer that cannot be used, or a folder that cannot be written.
    """
    out, console = Path(out), console or Console(quiet=True)
    text = text_of([data] if isinstance(data, str) else data, text_field)
    with _writing(out, "choose another one with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out.with_name(f".{out.name}.lock"), console):
            sample = list(_sample([text], validation_fraction)) if tokenizer == "bpe" else []
            chosen = build_tokenizer(tokenizer, sample, vocab_size)
            source = text.digest or text.file_digest()
            key = _key("tokens", source, text, validation_fraction, tokenizer_digest(chosen))
            if not _holds(out, key):
                _write(out, key, text, chosen, validation_fraction, console)
    return open_tokens(out, chosen)


def _key(kind: str, source: str, text: Text, *rest: object) -> str:
    """Return the key of what is made of a text, whose digest is ``source``."""
    return _hash([FORMAT, kind, source, *text.read_as, *rest])[:32]


def _holds(folder: Path, key: str) -> bool:
    """Return True for the tokens of a key, and False for nothing.

    Raises:
        ConfigError: the folder holds something else.
    """
    if not os.path.lexists(folder):
        return False
    try:
        found = read_json(folder / INDEX).get("key")
    except CheckpointError:
        found = None
    if found != key:
        raise ConfigError(f"{folder} exists, and does not hold the tokens of this text: choose another one with --out")
    return True


def _write(folder: Path, key: str, text: Text, tokenizer: Tokenizer, fraction: float | None, console: Console) -> None:
    """Write the tokens of a text, unless it changes meanwhile."""
    before = _identities(text.files())
    with progress_of(console, text) as advance:
        write_tokens(folder, key, text, tokenizer, fraction, advance)
    if _identities(text.files()) != before:
        remove(folder)
        raise DataError(f"{text.name} has changed while it was read: start again when nothing writes to it")


@contextmanager
def _writing(folder: Path, remedy: str) -> Iterator[None]:
    """Turn the errors of the disk into one that names the folder.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        yield
    except (OSError, CheckpointError) as error:
        raise DataError(f"cannot write to {folder}: {error}; make room on its disk, or {remedy}") from error


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    """Hold a file against other processes, which wait for as long as it takes."""
    import fcntl  # Windows does not have it

    waited = False
    refuse_link(path)
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    console.print("Waiting for another process that tokenizes the same text")
                waited = True
                time.sleep(_PATIENCE)
                continue
            if os.fstat(file.fileno()).st_nlink:  # else the process that held it has removed it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def is_cache(path: Path) -> bool:
    """Return True for a folder that `TokenCache` has made."""
    try:
        with open(path / CACHE_TAG, encoding="utf-8") as tag:
            return tag.read(len(_SIGNATURE)) == _SIGNATURE
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def progress_of(console: Console, text: Text) -> Iterator[Advance]:
    """Show how far a text is encoded; yields the function that says so."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Tokenizing", total=None)

        def advance(num_bytes: int) -> None:
            bar.update(task, advance=num_bytes, total=text.num_bytes)

        yield advance


def _sample(texts: list[Text], fraction: float | None) -> Iterator[str]:
    """Yield the training part of texts, or an evenly spread sample of `SAMPLE_BYTES` of it."""
    splits = [text.held_out_from(fraction)[0] for text in texts]
    total, read, taken = sum(int(held.sum()) for held in splits), 0, 0
    for text, held in zip(texts, splits, strict=True):
        for fragment in text.fragments(held):
            size = byte_length(str(fragment.content))
            if not fragment.held_out:
                if taken * total <= read * min(total, SAMPLE_BYTES):
                    taken += size
                    yield str(fragment.content)
                read += size


def _identities(files: list[Path]) -> list[tuple[str, int, int, int, int, int]]:
    """Return paths, sizes, times and inodes of files, which change with their contents."""
    found = []
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; check that it exists and is readable") from error
        times = status.st_mtime_ns, status.st_ctime_ns
        found.append((str(path.resolve()), status.st_size, *times, status.st_ino, status.st_dev))
    return found


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
