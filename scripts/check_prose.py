"""Check the prose of documentation and docstrings: words to avoid, line lengths, first lines of docstrings.

    python scripts/check_prose.py

Prints a line per fault and exits with 1 if there is one. `make lint` runs it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 160
"""Longest line of a page, in characters; tables, code, links and pictures may be longer."""
AVOIDED = re.compile(r"\bnobody\b|\bwhat is worth\b|\bnats a (?:token|byte)\b|\bbits a byte\b|\bshall\b", re.IGNORECASE)
QUESTION = re.compile(r"(?:What|Whether|How|Where|Which|Who)\b")
FREE = re.compile(r"\s*(?:\||!\[|<|\[[^\]]+\]: )|.*\]\(\S{60,}\)")


def main() -> None:
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    modules = sorted(path for folder in ("src", "experiments", "examples") for path in (ROOT / folder).rglob("*.py"))
    faults = [fault for path in pages for fault in page_faults(path)]
    faults += [fault for path in modules for fault in docstring_faults(path)]
    print("\n".join(faults), end="\n" if faults else "")
    sys.exit(bool(faults))


def page_faults(path: Path) -> Iterator[str]:
    """Return the faults of a page."""
    code = False
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        place = f"{path.relative_to(ROOT)}:{number}"
        if line.startswith("```"):
            code = not code
        if found := AVOIDED.search(line):
            yield f"{place}: avoid {found[0]!r}"
        if len(line) > LONGEST and not code and not FREE.match(line):
            yield f"{place}: {len(line)} characters, at most {LONGEST}"


def docstring_faults(path: Path) -> Iterator[str]:
    """Return the faults of the docstrings of a module."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        if text and (found := AVOIDED.search(text)):
            yield f"{place}: avoid {found[0]!r}"
        if text and QUESTION.match(text):
            yield f"{place}: the docstring begins with a question: {text.splitlines()[0]!r}"


if __name__ == "__main__":
    main()
