import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Resolvent = Callable[..., Any]


def test_tables_hold_the_figures(resolvent: Resolvent, run_dir: Path, text_file: Path, tmp_path: Path):
    found = tmp_path / "found.json"
    out = resolvent("evaluate", "positions", run_dir, "--data", text_file, "--length", 8, "--json", found).out
    row = json.loads(found.read_text())["rows"][-1]
    line = out.splitlines()[-1]
    assert line.split()[:5] == ["5", "-", "8", str(row["sequences"]), str(row["tokens"])]
    for figure in (row["loss"]["mean"], row["bits_per_byte"], row["windows_loss"]["standard_error"]):
        assert f"{figure:.4f}" in line
