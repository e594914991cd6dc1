"""Encode texts batch by batch, in this process or in several, in order and with bounded memory."""

import json
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from resolvent.data import encode_process
from resolvent.data.corpus import EOT
from resolvent.data.tokenization import bytes_tokenizer
from resolvent.errors import DataError
from resolvent.memory import machine_memory
from resolvent.native import LibraryPanic, call

T = TypeVar("T")
Item = TypeVar("Item")

_FEW_CHARACTERS = 1 << 21
_BYTES_PER_CHARACTER = 200
"""Most memory that the library takes while it encodes."""


def batched(items: Iterable[Item], characters: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Yield the items in lists; each ends with the item at which it has ``most`` characters or more."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += characters(item)
        if held >= most:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class Encoder:
    """An encoder of texts. As a context manager it starts its processes and stops them.

    The library's own threads encode a batch in this process. Processes of their own encode several batches at once and
    turn the library's lists into arrays, too, which in one process a single core does for all.

    Args:
        tokenizer: as `build_tokenizer` and `load_tokenizer` make it.
        processes: number of processes; 0 encodes in this one.

    Raises:
        DataError: a tokenizer that the two did not make.
    """

    def __init__(self, tokenizer: Tokenizer, processes: int = 0) -> None:
        separator = tokenizer.token_to_id(EOT)
        if separator is None or not tokenizer.encode_special_tokens:
            raise DataError(f"the tokenizer does not keep {EOT} apart from text; make it with build_tokenizer")
        self.separator: int = separator
        self.dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
        self.is_bytes = tokenizer.to_str() == bytes_tokenizer().to_str()
        self.cuts_anywhere = self.is_bytes or _pieces_are_exact(tokenizer)
        self._tokenizer = tokenizer
        self._count = 0 if self.is_bytes else processes
        self._processes: list[_Process] = []

    def __enter__(self) -> Self:
        definition = self._tokenizer.to_str() if self._count else ""
        for _ in range(self._count):
            self._processes.append(_Process(definition))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            process.stop()
        self._processes = []

    def encode(self, batches: Iterable[tuple[T, list[str]]]) -> Iterator[tuple[T, list[np.ndarray]]]:
        """Encode batches of texts.

        Args:
            batches: something that a batch is known by, and its texts.

        Returns:
            The same, with the ids of every text in the place of the texts, in order.

        Raises:
            DataError: a text that the tokenizer has no tokens for, or that memory is too short for.
        """
        if self._processes:
            yield from self._in_processes(batches)
            return
        for name, texts in batches:
            yield name, self._here(texts)

    def _in_processes(self, batches: Iterable[tuple[T, list[str]]]) -> Iterator[tuple[T, list[np.ndarray]]]:
        """Encode batches of texts, of which each process has one and one more waits, and yield them in order."""
        idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            idle.put(process)

        def elsewhere(texts: list[str]) -> list[np.ndarray]:
            process = idle.get()
            try:
                return process.encode(texts)
            finally:
                idle.put(process)

        waiting: deque[tuple[T, Future[list[np.ndarray]]]] = deque()
        with ThreadPoolExecutor(len(self._processes), thread_name_prefix="encode") as threads:
            try:
                for name, texts in batches:
                    _refuse_too_long(texts)
                    waiting.append((name, threads.submit(elsewhere, texts)))
                    if len(waiting) > 2 * len(self._processes):
                        name, future = waiting.popleft()
                        yield name, future.result()
                while waiting:
                    name, future = waiting.popleft()
                    yield name, future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for process in self._processes:  # ends the wait for their replies
                    process.stop()
                raise

    def _here(self, texts: list[str]) -> list[np.ndarray]:
        if self.is_bytes:  # the ids are at hand
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        _refuse_too_long(texts)
        try:
            return call(lambda: encode_process.token_ids(self._tokenizer, texts))
        except LibraryPanic:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise _cannot_encode(error) from error


class _Process:
    """A process that encodes texts. It has a session of its own: signals of a terminal are for this process alone."""

    def __init__(self, definition: str) -> None:
        command = [sys.executable, "-P", encode_process.__file__]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        self._send(definition)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of texts."""
        try:
            self._send(json.dumps(texts))
            assert self._process.stdout is not None
            fault, counts, ids = (encode_process.receive(self._process.stdout) for _ in range(3))
        except (EOFError, OSError) as error:
            raise DataError(
                f"a process that encodes text has ended (exit status {self._process.poll()}): make sure that there is "
                "memory for it, and start again; what is encoded is kept"
            ) from error
        if fault:
            raise _cannot_encode(fault.decode())
        return np.split(np.frombuffer(ids, np.uint32), np.cumsum(np.frombuffer(counts, np.int64))[:-1])

    def _send(self, message: str) -> None:
        assert self._process.stdin is not None
        encode_process.send(self._process.stdin, message.encode())

    def stop(self) -> None:
        """End the process, at once."""
        self._process.kill()
        self._process.wait()


def _cannot_encode(fault: object) -> DataError:
    return DataError(f"the tokenizer cannot encode the text: {fault}; train one on it (bpe)")


def _refuse_too_long(texts: list[str]) -> None:
    """Refuse a piece that takes more memory to encode than is free."""
    text = max(texts, key=len)
    if len(text) > _FEW_CHARACTERS and (needed := len(text) * _BYTES_PER_CHARACTER) > machine_memory().available:
        raise DataError(
            f"{len(text):,} characters from {text[:20]!r} on must be encoded at once, as there is no place to cut "
            f"them, which takes about {needed:,} bytes of memory, more than is free: break the text into lines, or "
            "take the tokenizer bytes"
        )


def _pieces_are_exact(tokenizer: Tokenizer) -> bool:
    """Return True if nothing before the pre-tokenizer, nor the pre-tokenizer, looks across a line's end."""
    splitter = tokenizer.pre_tokenizer
    return (
        isinstance(splitter, pre_tokenizers.ByteLevel)
        and splitter.use_regex
        and not splitter.add_prefix_space
        and tokenizer.normalizer is None
        and [token.content for token in tokenizer.get_added_tokens_decoder().values()] == [EOT]
    )
