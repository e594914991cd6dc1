"""Try an installed `resolvent`: train a tiny model on the CPU, go on with it, let it write and measure it.

python scripts/try_command.py .venv/bin/resolvent
"""

import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = [part for size in ("d_model=16", "n_layers=1", "num_heads=2", "head_dim=8") for part in ("--set", size)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try_command(Path(sys.argv[1]).absolute(), Path(folder))


def try_command(command: Path, folder: Path) -> None:
    """Run every step in an existing folder.

    Raises:
        SystemExit: naming the first step that failed, or did not write what it should.
    """

    def step(*arguments: str, writes: str) -> None:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode != 0 or writes not in done.stdout:
            raise SystemExit(f"{command} {' '.join(arguments)} did not write {writes!r}:\n{done.stdout}{done.stderr}")

    (folder / "text.txt").write_text("A line of some text.\n" * 100)
    step("presets", writes="large")
    length = ("--steps", "2", "--seq-len", "32", "--device", "cpu")
    step("train", "--data", "text.txt", "--out", "run", *length, *SIZES, writes="resolvent generate run")
    step("train", "--resume", "run", writes="resolvent generate run")
    step("generate", "run", "--prompt", "A line", "--max-new-tokens", "3", writes="A line")
    step("evaluate", "run", "--data", "text.txt", "--json", "-", writes="bits_per_byte")


if __name__ == "__main__":
    main()
