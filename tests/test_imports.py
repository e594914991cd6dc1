"""The import contract of pyproject.toml: it holds, a forbidden import breaks it, and its picture is complete."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "resolvent"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
CONTRACTS = {contract["id"]: contract for contract in SETTINGS["contracts"]}
TOP_LEVEL = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {
    "__init__"
}


def check(source: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    """Check the package in the folder ``source`` against some contracts, or all."""
    run = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    options = [option for name in contracts for option in ("--contract", name)]
    return subprocess.run(
        [sys.executable, "-c", run, str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo", *options],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_contract_holds():
    done = check(ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(CONTRACTS)} kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("contract", "module", "line"),
    [
        ("layers", "ops/bk_core.py", "from resolvent import cli"),
        ("layers", "data/corpus.py", "from resolvent.models import load_model"),
        ("layers", "novel.py", ""),
        ("operators", "ops/bk_core.py", "from resolvent import cli"),
        ("operators", "ops/bk_core.py", "from resolvent.files import read_json"),
        ("circles", "models/config.py", "if TYPE_CHECKING:\n    from resolvent.models.base import IntegratedModel"),
    ],
)
def test_forbidden_import_breaks_contract(contract: str, module: str, line: str, tmp_path: Path):
    shutil.copytree(PACKAGE, tmp_path / "resolvent", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "resolvent" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = check(tmp_path, contract)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Contracts: 0 kept, 1 broken." in done.stdout
    assert Path(module).stem in done.stdout


def test_operators_may_import_errors_alone():
    forbidden = set(CONTRACTS["operators"]["forbidden_modules"])
    assert forbidden == {f"resolvent.{name}" for name in TOP_LEVEL - {"ops", "errors"}}


def test_picture_names_every_package():
    picture = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")
    names = {name for text in picture.split('">')[1:] for name in text.split("</text>")[0].split(", ")}
    missing = {name for name in TOP_LEVEL if not name.startswith("_")} - names
    assert not missing, "docs/images/architecture.svg is old: run `make architecture`"
