"""Help and completion."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

from resolvent.cli.app import app
from resolvent.cli.help import flowing

Resolvent = Callable[..., Any]


def _commands() -> dict[str, Any]:
    """Every command and group by what is typed."""
    root: Any = get_command(app)
    measures = root.commands["evaluate"].commands
    return {"": root, **root.commands, **{f"evaluate {name}": command for name, command in measures.items()}}


COMMANDS = _commands()


def prose(page: str) -> list[list[str]]:
    """The lines of the paragraphs between usage and options."""
    above = page[: page.index("╭")].splitlines()
    parts = "\n".join(line.strip() for line in above).split("\n\n")
    return [part.splitlines() for part in parts if part.strip() and not part.strip().startswith("Usage:")]


def assert_flows(lines: list[str], width: int) -> None:
    """No line of a paragraph ends before the next word would have had no room."""
    for line, following in itertools.pairwise(lines):
        assert len(line) + 1 + len(following.split()[0]) > width, (line, following)


def cell(page: str, text: str) -> tuple[list[str], int]:
    """The lines in which a text stands in the last column of a table, and the width of that column."""
    rows = [row[:-2] for row in page.splitlines() if row.startswith("│")]
    for number, row in enumerate(rows):
        for start in (match.end() for match in re.finditer(r"  +", row)):
            lines, rest = [], text
            for line in (following[start:].rstrip() for following in rows[number:]):
                line = rest if line.startswith(rest) else line  # the default may stand beside the text
                if not line or not rest.startswith(line):
                    break
                lines.append(line)
                rest = rest[len(line) :].lstrip()
                if not rest:
                    return lines, len(row) - start
    raise AssertionError(f"{text!r} is not a cell of\n{page}")


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_wraps_at_any_width(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, command: str, width: int):
    monkeypatch.setenv("COLUMNS", str(width))
    page = resolvent(*command.split(), "--help").out
    assert max(map(len, page.splitlines())) <= width
    assert "…" not in page
    assert not re.search(r"[<{]\w+[ |}>]", page), page
    paragraphs = prose(page)
    for lines in paragraphs:
        assert_flows(lines, width - 2)
    told = re.sub(r"\[/?bold\]", "", COMMANDS[command].help)
    assert [" ".join(lines) for lines in paragraphs] == told.split("\n\n")
    for parameter in COMMANDS[command].params:
        if parameter.help:
            assert_flows(*cell(page, parameter.help))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_leaves_no_line_break_to_the_source(command: str):
    assert "\n" not in COMMANDS[command].help.replace("\n\n", "")
    assert not any("\n" in (parameter.help or "") for parameter in COMMANDS[command].params)


def test_docstring_becomes_one_line_per_paragraph():
    def command() -> None:
        """Do
        something.

        It has
        two lines.
        """  # noqa: D205

    assert flowing(command) == "Do something.\n\nIt has two lines."


def test_no_arguments_show_five_things_to_try(resolvent: Resolvent):
    outcome = resolvent()
    assert outcome.code == 0 and not outcome.err
    tried = re.findall(r"^  resolvent (\w+)(.*)$", outcome.out, re.MULTILINE)
    assert len(tried) == 5
    for name, rest in tried:
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert name == "evaluate" or set(re.findall(r"--[\w-]+", rest)) <= options


def test_flags_show_no_type_and_seeds_no_upper_bound(resolvent: Resolvent):
    page = resolvent("generate", "--help").out
    assert "<bool>" not in page and "[x>=0]" in page and "92233720368" not in page
    assert resolvent("generate", "nowhere", "--seed", 2**63).code == 2


def test_help_needs_no_unicode(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch):
    command = [sys.executable, "-m", "resolvent", "evaluate", "positions", "--help"]
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"+- is one standard error" in b" ".join(done.stdout.split()) and not done.stderr


def completed(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, line: str) -> list[str]:
    """Return the completions of bash at the end of a line."""
    monkeypatch.setenv("_RESOLVENT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    outcome = resolvent()
    assert not outcome.err
    return outcome.out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("resolvent ev", ["evaluate"]),
        ("resolvent evaluate n", ["needle"]),
        ("resolvent evaluate runs/x --js", ["--json"]),
        ("resolvent evaluate a b --js", ["--json"]),
        ("resolvent train --l", ["--lr-find", "--lora", "--learning-rate", "--lr", "--log-interval"]),
        ("resolvent train --schedule w", ["wsd"]),
    ],
)
def test_commands_options_and_choices_are_completed(
    resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch, line: str, offered: list[str]
):
    assert completed(resolvent, monkeypatch, line) == offered


def test_completion_is_shown_for_a_shell(resolvent: Resolvent, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    outcome = resolvent("--show-completion", "bash")
    assert outcome.code == 0 and not outcome.err
    assert "_RESOLVENT_COMPLETE=complete_bash" in outcome.out and outcome.out.rstrip().endswith(" resolvent")
