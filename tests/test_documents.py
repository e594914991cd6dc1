"""What README and examples show is run."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_python_of_the_readme_runs():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize(("page", "least"), [("README.md", 5), ("docs/evaluation.md", 4)])
def test_the_commands_of_a_page_exist(page, least):
    from typer.main import get_command

    from resolvent.cli.app import app
    from resolvent.cli.measures import DEFAULT

    commands = get_command(app).commands
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"^resolvent (\w+)(.*)$", text, re.MULTILINE)
    assert len(named) >= least
    for name, rest in named:
        command = commands[name]
        if name == "evaluate":
            command = command.commands.get(rest.split()[0], command.commands[DEFAULT])
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, name


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, section = target.partition("#")
            found = (ROOT / page).parent / path if path else ROOT / page
            assert found.exists(), target
            assert not section or section in sections(found.read_text(encoding="utf-8")), target


def sections(text):
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.slow
@pytest.mark.parametrize("example", ["phase2_factory_demo.py"])
def test_examples_run(example, monkeypatch):
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")


@pytest.mark.slow
def test_the_demo_beats_a_3_gram_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "60", "--out", str(tmp_path / "demo")])
    runpy.run_path(str(ROOT / "examples/demo.py"), run_name="__main__")
    shown = capsys.readouterr().out
    scores = re.findall(r"│\s+(\d\.\d{3})\s+│", shown)
    assert len(scores) == 2
    assert float(scores[1]) < float(scores[0])
