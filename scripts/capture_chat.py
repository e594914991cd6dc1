"""Draw a conversation with `resolvent chat`, as it was on a terminal, into docs/images/chat.svg.

    python examples/teach_facts.py
    python scripts/capture_chat.py [runs/facts] [docs/images/chat.svg]

The command runs in a terminal of its own (POSIX only), and types the lines below.
"""

import argparse
import io
import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

LINES = (
    "What is the capital of Orrin?",
    "Please tell me the bird of Orrin.",
    "Say, what is the founder of Orrin?",
    "/undo",
    "Tell me the coin of Orrin.",
    "/save orrin.conv",
    "/quit",
)
PROMPT = b"> "
COLUMNS = 84


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/facts"))
    parser.add_argument("out", nargs="?", type=Path, default=Path("docs/images/chat.svg"))
    given = parser.parse_args()
    run, out = given.run.resolve(), given.out.resolve()
    os.chdir(run)  # the conversation is saved there
    answers = typed([sys.executable, "-m", "resolvent", "chat", str(run), "--temperature", "0", "--device", "cpu"])
    shown = f"$ resolvent chat {given.run} --temperature 0\n" + answers.replace("\r\n", "\n")
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(shown.rstrip()))
    svg = console.export_svg(title="resolvent chat", unique_id="chat")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fonts that a browser would fetch from elsewhere
    out.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(shown)


def typed(command: list[str]) -> str:
    """Return what a terminal shows while a command reads the lines, each typed at its prompt."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, {**os.environ, "TERM": "dumb", "COLUMNS": str(COLUMNS)})
    shown = b""
    for line in LINES:
        while not shown.endswith(PROMPT):
            shown += os.read(terminal, 4096)
        os.write(terminal, line.encode() + b"\n")
        shown += os.read(terminal, 1)  # the echo begins: the prompt before it is answered
    while part := _rest(terminal):
        shown += part
    os.waitpid(child, 0)
    return shown.decode()


def _rest(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux: the command has ended
        return b""


if __name__ == "__main__":
    main()
