"""Commands that compute nothing, help and refusals, do not import heavy libraries."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from resolvent.cli.app import app
from tests.cli.conftest import Outcome, words

HEAVY = ("accelerate", "fastapi", "jinja2", "matplotlib", "numpy", "pandas", "tokenizers", "torch", "transformers")

RUN = f"""
import json, sys
from resolvent.cli import main

outcomes = []
for line in json.load(sys.stdin):
    sys.argv = ["resolvent", *line]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    loaded = [name for name in {HEAVY} if name in sys.modules]
    outcomes.append([line, code, loaded])
print()
print(json.dumps(outcomes))
"""


def assert_light(lines: list[list[str]], code: int, folder: Path) -> str:
    """Assert that every command ends with a code and imports nothing heavy; return what they print as errors."""
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, cwd=folder, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[line, code, []] for line in lines]
    return done.stderr


def test_help_imports_nothing_heavy(tmp_path: Path):
    root = get_command(app)
    measures = root.commands["evaluate"].commands  # pyrefly: ignore[missing-attribute]
    names = [*root.commands, *(f"evaluate {name}" for name in measures)]  # pyrefly: ignore[missing-attribute]
    pages = [[*name.split(), "--help"] for name in names]
    assert len(pages) > 12
    assert_light([["--help"], ["--version"], [], *pages], 0, tmp_path)


def test_wrong_options_import_nothing_heavy(tmp_path: Path):
    wrong = [
        "tarin",
        "train --stepz 5",
        "train --steps many",
        "train --steps 0",
        "train --data a:0.5 --lora r=0",
        "generate",
        "generate runs/x --samples 0",
        "generate runs/x --top-p 3",
        "evaluate needle runs/x --candidates 1",
        "serve runs/x --port 70000",
    ]
    assert_light([line.split() for line in wrong], 2, tmp_path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("generate x --samples 0", "--samples.*(must be greater than or equal to 1, got 0|0 is not in the range)"),
        ("generate x --samples q", "--samples.*(must be a valid integer.* got q|'q' is not a valid integer)"),
        ("generate x --top-p 1.5", "--top-p.*(must be less than or equal to 1, got 1.5|1.5 is not in the range)"),
        ("generate x --weights q", r"--weights': 'q' is not one of 'full', 'stored', 'int8'"),
        ("train --steps 0", "steps must be >= 1, got 0"),
    ],
)
def test_wrong_values_are_named_with_option_and_remedy(resolvent: Callable[..., Outcome], line: str, told: str):
    outcome = resolvent(*line.split())
    assert outcome.code == 2 and re.search(told, words(outcome.err))


MISSING = {
    "generate no/run": "Error: no/run holds no model: there is no such folder",
    "chat no/run": "Error: no/run holds no model: there is no such folder",
    "serve no/run": "Error: no/run holds no model: there is no such folder",
    "inspect no/run": "Error: no/run holds no model: there is no such folder",
    "evaluate no/run": "Error: no/run holds no model: there is no such folder",
    "evaluate needle no/run": "Error: no/run holds no model: there is no such folder",
    "evaluate empty": "Error: empty holds no model: there is no model.safetensors in it",
    "evaluate .": "Error: . holds no model, but folders in it do: name one, such as model",
    "generate model/model.safetensors": "Error: model/model.safetensors holds no model, it is a file: name the folder",
    "inspect link": "Error: link holds no model: it is a link to 'gone', which does not exist",
    "convert no/run out": "Error: no/run holds no model: there is no such folder",
    "inspect model --compare no/run": "Error: no/run holds no model: there is no such folder",
    "evaluate model --data no.txt": "Error: cannot read no.txt: No such file or directory",
    "inspect model --data no.txt": "Error: cannot read no.txt: No such file or directory",
    "tokenize --data no.txt --out tokens": "Error: cannot read no.txt: No such file or directory",
    "train --data no.txt": "Error: cannot read no.txt: No such file or directory",
    "train --data model:1 --data no.txt:2": "Error: cannot read no.txt: No such file or directory",
    "train --validation-data no.txt": "Error: cannot read no.txt: No such file or directory",
    "train --from no/run": "Error: no/run holds no model: there is no such folder",
    "train --resume no/run": "Error: no/run holds no training run: there is no such folder",
    "train --resume model": "Error: model holds no training run: there is no training.json in it",
    "train --out model": "Error: the run folder model is not empty",
    "train --out link": "Error: the run folder link is a link to nothing (gone): choose another one with --out",
    "train --out model/config.json/x": "Error: the run folder model/config.json/x cannot be made, model/config.json is",
}


def test_missing_paths_are_named_before_heavy_imports(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("gone")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).touch()
    errors = assert_light([line.split() for line in MISSING], 1, tmp_path).splitlines()
    assert [error[: len(told)] for error, told in zip(errors, MISSING.values(), strict=True)] == list(MISSING.values())
