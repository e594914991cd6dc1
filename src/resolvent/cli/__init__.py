"""The command line: `resolvent train | generate | evaluate | inspect | convert | presets | benchmark`."""

import logging
import os
import signal
import sys
import traceback
from types import TracebackType

from resolvent.errors import ResolventError
from resolvent.native import is_busy, panics_are_errors


def main() -> None:
    """Run the command line. Errors are one line on stderr: exit code 1, or 2 where the command is at fault."""
    # OpenMP's threads wait for each other by spinning, for milliseconds at a time. Where another process holds a core,
    # that cuts training to a thirtieth of its speed; with a short spin it loses nothing. Read when torch is loaded.
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
    except KeyboardInterrupt:  # Typer sees to one within a command
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

        rich_utils.COLOR_SYSTEM = None  # of help and usage errors; Rich alone would leave bold type
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
    """Shows warnings on standard error, of which a terminal obeys none."""

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
    """Write what is still to be written: an error would show as a traceback when Python ends."""
    from resolvent.terminal import discard_output

    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):  # a reader who has seen enough is no error
            print(f"Error: cannot write to standard output: {error}", file=sys.stderr)
        sys.exit(1)


def _explain(error: BaseException) -> str:
    """What a user can act on. Torch's own error is recognised by name: it need not have been imported."""
    if isinstance(error, ResolventError | OSError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: use a smaller batch size or shorter sequences ({error})"
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    return f"unexpected {type(error).__name__}: {error} (resolvent --debug {command} ... shows where)"
