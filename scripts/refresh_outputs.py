"""Run the commands that pages show with their output, and put the output of today into the pages.

    python scripts/refresh_outputs.py README.md docs/tutorial.md
    python scripts/refresh_outputs.py --pictures README.md

`--pictures` also takes the pictures of the inspection page, which needs Chromium. A block of `console` holds
commands behind `$ ` and their output. Where the output begins with the line `...`, only as many last lines are shown
as before. The commands of a page run in order, in one new folder.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
CUT = "..."
PICTURES = ROOT / "docs" / "images"
SIZE = (830, 860)
"""Width and height of the pictures: README pages are 830 pixels wide."""


def refresh(page: str, run: Callable[[str], str]) -> str:
    """Return a page whose console blocks hold what ``run`` returns for their commands."""
    return BLOCK.sub(lambda block: "".join(_shown(part, run) for part in _parts(block[0])), page)


def commands(page: str) -> list[str]:
    """Return the commands of the console blocks of a page."""
    return [part.partition("\n")[0].removeprefix("$ ") for block in BLOCK.findall(page) for part in _parts(block)]


def _parts(block: str) -> list[str]:
    """Split a block into commands, each with its output."""
    return re.findall(r"^\$ .*\n(?:(?!\$ ).*\n)*", block, re.MULTILINE)


def _shown(part: str, run: Callable[[str], str]) -> str:
    first, *before = part.splitlines()
    after = [line.rstrip() for line in run(first.removeprefix("$ ")).splitlines()]
    if before and before[0] == CUT:
        after = [CUT, *after[len(after) - (len(before) - 1) :]]
    return "\n".join([first, *after]) + "\n"


def run_in(folder: Path) -> Callable[[str], str]:
    """Return a function that runs commands of `resolvent` in a folder and returns what they print."""

    def run(command: str) -> str:
        print(f"$ {command}", file=sys.stderr)
        shell = command.replace("resolvent", f"{sys.executable} -m resolvent", 1)
        options = dict(cwd=folder, text=True, check=True, env=os.environ | {"COLUMNS": "96"})
        return subprocess.run(shell, shell=True, stdout=subprocess.PIPE, **options).stdout

    return run


def take_pictures(page: Path) -> None:
    """Save pictures of the beginning of an inspection page, light and dark."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("pictures need Chromium: no chromium or google-chrome in the path")
    for name, scheme in (("light", 1), ("dark", 0)):
        with tempfile.TemporaryDirectory() as user:
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
            flags += [f"--user-data-dir={user}", f"--blink-settings=preferredColorScheme={scheme}"]
            flags += [f"--window-size={SIZE[0]},{SIZE[1]}", "--force-device-scale-factor=1.5"]
            target = f"--screenshot={PICTURES / f'inspection-{name}.png'}"
            subprocess.run([chromium, *flags, target, page.resolve().as_uri()], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--pictures", action="store_true")
    arguments = parser.parse_args()
    for path in arguments.pages:
        with tempfile.TemporaryDirectory() as folder:
            page = refresh(path.read_text("utf-8"), run_in(Path(folder)))
            path.write_text(page, "utf-8")
            if arguments.pictures:
                for inspection in Path(folder).rglob("inspection.html"):
                    take_pictures(inspection)


if __name__ == "__main__":
    main()
