"""The command line: `resolvent train | generate | evaluate | inspect | convert | presets | benchmark`."""

import os
import sys

from resolvent.errors import ResolventError


def main() -> None:
    """Run the command line. Errors are one line on stderr: exit code 1, or 2 where the command is at fault."""
    # OpenMP's threads wait for each other by spinning, for milliseconds at a time. Where another process holds a core,
    # that cuts training to a thirtieth of its speed; with a short spin it loses nothing. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from resolvent.cli.app import app

    try:
        app(prog_name="resolvent")
    except Exception as error:
        if os.environ.get("RESOLVENT_DEBUG"):
            raise
        print(f"Error: {_explain(error)}", file=sys.stderr)
        sys.exit(1)


def _explain(error: Exception) -> str:
    """What a user can act on. Torch's own error is recognised by name: it need not have been imported."""
    if isinstance(error, ResolventError | OSError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: use a smaller batch size or shorter sequences ({error})"
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    return f"unexpected {type(error).__name__}: {error} (resolvent --debug {command} ... shows where)"
