"""The example that teaches a page of facts: the model answers, in words that it was not taught, too."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "teach_facts.py"


@pytest.mark.slow
def test_model_answers_about_the_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--out", str(tmp_path / "facts")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    right = re.findall(r"(\d+) of 12", capsys.readouterr().out)
    taught_before, taught, new_before, new = map(int, right)
    assert taught_before == new_before == 0
    assert min(taught, new) >= 10
