"""The command line.

`resolvent train | generate | chat | serve | evaluate | inspect | convert | presets | benchmark`.
"""

import logging
import os
import signal
import sys
import traceback
from types import TracebackType

from resolvent.errors import ResolventError
from resolvent.native import is_busy, panics_are_errors


def main() -> None:
    """Run the command line. Errors are one line on stderr, with exit code 1, or 2 for a wrong command line."""
    # OpenMP's threads wait for each other by spinning, for milliseconds at a time. If another process uses a core, this
    # cuts the speed of training to a thirtieth; a short spin costs nothing. OpenMP reads it when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        _run_and_flush()
    except SystemExit as stop:
        # Python would take seconds to end beside a library that still computes, and the library would abort the
        # process when it returns to a Python that is gone. What there was to write is written.
        if is_busy():
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        raise


def _run_and_flush() -> None:
    try:
        _run()
    except KeyboardInterrupt:  # Typer handles one within a command
        sys.exit(128 + signal.SIGINT)
    finally:
        _flush()


def _run() -> None:
    from resolvent.terminal import degrade_streams, for_terminal

    degrade_streams(sys.stdout, sys.stderr)
    logging.lastResort = _WarningHandler()
    from resolvent.cli.app import app

    if os.environ.get("NO_COLOR"):
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM = None  # of help and usage errors; Rich alone would keep bold type
    try:
        with panics_are_errors():
            app(prog_name="resolvent")
    except Exception as error:
        if os.environ.get("RESOLVENT_DEBUG"):
            sys.excepthook = _show_traceback
            raise
        print(for_terminal(f"Error: {_explain(error)}", sys.stderr), file=sys.stderr)
        sys.exit(1)


class _WarningHandler(logging.Handler):
    """Handler that prints warnings on standard error, with control characters escaped."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        from resolvent.terminal import for_terminal

        print(for_terminal(self.format(record), sys.stderr), file=sys.stderr)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from resolvent.terminal import for_terminal

    text = "".join(traceback.format_exception(kind, error, trace))
    print(for_terminal(text, sys.stderr), file=sys.stderr, end="")


def _flush() -> None:
    """Flush standard output: an error at the exit of Python would print a traceback."""
    from resolvent.terminal import discard_output

    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):  # a reader may close the pipe early
            print(f"Error: cannot write to standard output: {error}", file=sys.stderr)
        sys.exit(1)


def _explain(error: BaseException) -> str:
    """Return the message of an error. The error of torch is recognised by name, without importing torch."""
    if isinstance(error, ResolventError | OSError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: use a smaller batch size or shorter sequences ({error})"
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    return f"unexpected {type(error).__name__}: {error} (resolvent --debug {command} ... shows where)"
