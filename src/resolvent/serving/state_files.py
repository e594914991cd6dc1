"""States on disk, by the tokens before them, for servers that start again or share a folder.

A file is found by a hash of everything that decides the bits of a state: weights, configuration, tokens, block size,
versions, device and threads. So a state from a file equals the state of another reading to the bit, and a folder may
hold files of several models.
"""

import hashlib
import json
import logging
import os
import queue
import secrets
import stat
import threading
import time
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..errors import CheckpointError, ConfigError
from ..models import IntegratedModel
from ..models.state import ModelState
from ..models.storage import weights_digest
from ..ops.precision import wide_dtype

_log = logging.getLogger(__name__)

_ENDING = ".state"
_PARTIAL = ".partial"
_WRITING_SECONDS = 3600
"""Age from which an incomplete file is that of a killed server."""
_QUEUED = 16
"""States that wait to be written; the reading of prompts waits beyond that."""


class StateFiles:
    """Folder of states of one sequence each, of which the least recently used are removed.

    A thread of its own writes the files. Several servers may use one folder: a file appears whole under its name, and
    one that another server has removed is no error.

    Args:
        folder: the folder, made if missing; only its owner may read it, since states tell of the prompts.
        model: the model that the states belong to.
        block: tokens per block of a prompt.
        most_bytes: limit on the size of all files in the folder.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path, model: IntegratedModel, *, block: int, most_bytes: int) -> None:
        self._folder, self._model, self._block, self._most_bytes = folder, model, block, most_bytes
        self._salt = _salt(model, block)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            trial = self._partial("trial")
            trial.write_bytes(b"")
            trial.unlink()
        except OSError as error:
            raise ConfigError(f"cannot keep states in {folder}: {error}") from error
        self._queue: queue.Queue[tuple[bytes, ModelState] | None] = queue.Queue(_QUEUED)
        self._writer = threading.Thread(target=self._write_all, name="resolvent-states", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._queue.put(None)
        self._writer.join()

    def has(self, key: bytes) -> bool:
        """Return True if there is a file for a key."""
        return _exists(self._path(key))

    def load(self, key: bytes, blocks: int) -> ModelState | None:
        """Return a state from its file; None if the file is gone, or damaged, which removes it.

        Args:
            key: key of the tokens.
            blocks: number of blocks that the state has read.
        """
        path = self._path(key)
        if not _exists(path):
            return None
        try:
            state = self._read(path, blocks)
        except CheckpointError as error:
            if _exists(path):  # otherwise another server has removed it
                _log.warning("A state of the prefix cache is damaged and will be removed: %s", error)
                _remove(path)
            return None
        try:
            os.utime(path)
        except OSError as error:  # another server has removed it, or owns it
            _log.debug("%s counts as used when it was written: %s", path, error)
        return state

    def store(self, key: bytes, state: ModelState) -> None:
        """Write a state, whose tensors must not change, soon."""
        if not self.has(key):
            self._queue.put((key, state))

    def _read(self, path: Path, blocks: int) -> ModelState:
        """Read a state and check that the model can go on from it.

        Raises:
            CheckpointError: the file is damaged, or holds another state.
        """
        weight: Any = self._model.lm_head.weight
        state_type: Any = self._model.state_type
        state: ModelState = state_type.load(path, weight.device)
        try:
            state.check(self._model.state_shapes(), 1, weight.device, wide_dtype(weight))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        if (position := int(state.position)) != blocks * self._block:
            raise CheckpointError(f"{path} is a state after {position:,} tokens, not {blocks * self._block:,}")
        return state

    def _write_all(self) -> None:
        """Write states until the end is queued. A state that cannot be written is lost, and the log says so."""
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:
                _log.warning("A state of the prefix cache could not be written: %s", error)
            except Exception:  # the thread must go on: the engine waits for it
                _log.exception("a state of the prefix cache could not be written")

    @torch.inference_mode()
    def _write(self, key: bytes, state: ModelState) -> None:
        path = self._path(key)
        if _exists(path) or state.nbytes > self._most_bytes:
            return
        partial = self._partial(path.name)
        try:
            state.save(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        self._evict()

    def _evict(self) -> None:
        """Remove the files that were used longest ago until the limit is kept, and remains of killed servers."""
        found, now = [], time.time()
        for entry in os.scandir(self._folder):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another server has removed it
                continue
            if entry.name.endswith(_ENDING) and stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime_ns, status.st_size, entry.path))
            elif entry.name.endswith(_PARTIAL) and now - status.st_mtime > _WRITING_SECONDS:
                _remove(Path(entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._most_bytes:
                return
            if _remove(Path(path)):
                total -= size

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{hashlib.sha256(self._salt + key).hexdigest()}{_ENDING}"

    def _partial(self, name: str) -> Path:
        """Return a name that no other process uses."""
        return self._folder / f"{name}.{secrets.token_hex(8)}{_PARTIAL}"


def _exists(path: Path) -> bool:
    """Return True if there is a file. Where the folder cannot be read there is none, and the log says so."""
    try:
        return path.exists()
    except OSError as error:
        _log.warning("The folder of the prefix cache cannot be read: %s", error)
        return False


def _remove(path: Path) -> bool:
    """Remove a file, and return True if it is gone; the log has the reason if it is not."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("The state cannot be removed: %s", error)
        return False
    return True


def _salt(model: IntegratedModel, block: int) -> bytes:
    """Return a hash of what decides the bits of a state beside the tokens."""
    weight: Any = model.lm_head.weight
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    decides = [
        __version__,
        torch.__version__,
        device,
        torch.get_num_threads(),
        block,
        str(weight.dtype),
        model.config.to_dict(),
        weights_digest(model),
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).digest()
