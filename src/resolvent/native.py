"""Calls of native libraries that signals interrupt and whose panics become exceptions."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from resolvent.errors import DataError

T = TypeVar("T")

_THREAD = "tokenizers"
_PATIENCE = 0.1
"""Seconds between two checks for signals: on Windows, an endless wait cannot be interrupted."""


class LibraryPanic(DataError):
    """A panic of the tokenizers library, for example of a regular expression that exceeds its limit."""


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Convert a panic of a Rust library, which is a BaseException, to an error.

    Raises:
        LibraryPanic: the library panicked.
    """
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise LibraryPanic(f"the tokenizers library failed ({panic}): use another tokenizer") from panic


def call(function: Callable[[], T]) -> T:
    """Call a library in another thread, so that this thread receives signals during a long call.

    A signal whose handler raises an exception ends the wait. The library cannot be stopped: the call goes on in the
    background until it returns or the process exits.

    Args:
        function: makes the call.

    Returns:
        The result of the call.

    Raises:
        LibraryPanic: the library panicked.
    """
    if threading.current_thread() is not threading.main_thread():  # no other thread receives signals
        with panics_are_errors():
            return function()
    results: list[T] = []
    faults: list[BaseException] = []

    def work() -> None:
        try:
            with panics_are_errors():
                results.append(function())
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work, name=_THREAD, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_PATIENCE)
    if faults:
        raise faults[0]
    return results[0]


def is_busy() -> bool:
    """Tell whether a call still goes on, of which a signal has ended the wait."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
