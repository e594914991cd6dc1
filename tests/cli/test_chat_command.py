"""`resolvent chat`: lines of standard input are said, and commands obeyed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Resolvent = Callable[..., Any]


def talk(run_dir: Path, text: str, *options: object) -> str:
    command = [
        sys.executable,
        "-m",
        "resolvent",
        "chat",
        run_dir,
        "--device",
        "cpu",
        "--max-new-tokens",
        "20",
        *options,
    ]
    done = subprocess.run(list(map(str, command)), input=text.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return done.stdout.decode()


def test_saved_conversation_goes_on(run_dir: Path, tmp_path: Path):
    path = tmp_path / "talk"
    first = talk(run_dir, f"the old cat\n/save {path}\nmore\n/quit\nnot said\n", "--seed", 3, "--temperature", 0)
    answer, saved, more = first.splitlines()
    assert saved.startswith(f"Saved in {path}, after ")
    assert talk(run_dir, "more\n", "--load", path, "--temperature", 0) == more + "\n"
    assert answer


def test_wrong_options_are_named(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    assert "--temperature" in resolvent("chat", run_dir, "--temperature", "inf").err
    outcome = resolvent("chat", run_dir, "--load", tmp_path / "missing", "--device", "cpu")
    assert outcome.code == 1
    assert f"cannot read {tmp_path / 'missing'}" in outcome.err
