"""Code and commands of README, pages and examples run."""

import re
import runpy
import shlex
import sys
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from resolvent import __version__

ROOT = Path(__file__).parents[1]


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in read(page)])
def test_the_python_of_a_page_runs(page, monkeypatch):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # as torchrun would say
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    snippets = re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)
    assert snippets
    try:
        for snippet in snippets:
            names = run(snippet, page)
            # What is read is read without dropout and without a graph, but for losses.
            assert not (names.keys() & {"logits", "state"} and names["model"].training)
            assert not ("logits" in names and names["logits"].requires_grad)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(snippet, page):
    names = {}
    exec(compile(snippet, page, "exec"), names)
    return names


def test_readme_claim_about_equal_logits_holds():
    """The logits are equal, and the shapes are those of the comments."""
    page = read("README.md")
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    said = "one forward pass, any split of it with the state passed on, and token by token give the same logits"
    assert said in " ".join(page.split())
    names = run(snippet, "README.md")
    model, ids = names["model"], names["ids"]
    shapes = re.findall(r"(\w+) = .*# (\(\d[\d, ]*\))", snippet)
    assert {name for name, _ in shapes} == {"logits", "text"}
    for name, shape in shapes:
        assert str(tuple(names[name].shape)) == shape
    with torch.no_grad():
        assert_laws_hold(model, ids)


def assert_laws_hold(model, ids):
    """Whole, in parts and token by token, packed and padded: the same logits."""
    whole = model(ids)
    assert torch.equal(model(ids), whole)
    same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    for sizes in ([60, 40], [33, 1, 66], [70] + [1] * 30):
        state, parts = None, []
        for part in ids.split(sizes, dim=1):
            logits, state = model(part, state=state, return_state=True)
            parts.append(logits)
        same(torch.cat(parts, dim=1), whole)
    packed = model(torch.cat([ids[:1], ids[1:, :70]], dim=1), cu_seqlens=torch.tensor([0, 100, 170]))
    same(packed[0, 100:], whole[1, :70])
    place = torch.arange(100, device=ids.device)
    for kept in (place >= 30, place < 70):
        mask = torch.stack([torch.ones_like(kept), kept])
        same(model(ids, attention_mask=mask)[1, kept], model(ids[1:, kept])[0])


COMMAND = re.compile(r"^(?:\$ )?resolvent (\w+)(.*)$", re.MULTILINE)
"""A command in a block of code: its name and the rest of its line."""


@pytest.mark.parametrize("page", [page for page in PAGES if COMMAND.search(read(page))])
def test_the_commands_of_a_page_exist(page):
    from typer.main import get_command

    from resolvent.cli.app import app
    from resolvent.cli.evaluate import DEFAULT

    commands = get_command(app).commands
    for name, rest in COMMAND.findall(read(page)):
        command = commands[name]
        if name == "evaluate":
            command = command.commands.get(rest.split()[0], command.commands[DEFAULT])
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, name


@pytest.mark.slow
@pytest.mark.parametrize(("page", "least"), [("docs/tutorial.md", 10), ("README.md", 4), ("docs/ja/quickstart.md", 9)])
def test_the_commands_of_a_page_can_be_followed(page, least, tmp_path, monkeypatch):
    """In their order, with few steps of training."""
    from tests.cli.conftest import call

    monkeypatch.chdir(tmp_path)
    Path("my_text.txt").write_text(
        "\n<|endoftext|>\n".join(f"The {n} old cats sat on {n} mats. " * 40 for n in range(30))
    )
    monkeypatch.setenv("RESOLVENT_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)
    shell = [block for language, block in blocks if language in ("", "bash", "console")]
    found = [line.removeprefix("$ ") for block in shell for line in block.splitlines()]
    commands = [line for line in found if re.match(r"resolvent (train|generate|evaluate|inspect) ", line)]
    assert len(commands) >= least
    for command in commands:
        arguments = shlex.split(re.sub(r"--steps (\d)\d*", r"--steps \1", command), comments=True)[1:]
        if arguments[0] == "train" and not {"--steps", "--resume"} & {*arguments}:
            arguments += ["--steps", "2"]
        assert call(*arguments) == 0, command


@pytest.mark.slow
def test_outputs_in_the_readme_have_the_form_of_today(tmp_path, monkeypatch):
    """Every command runs; the output has the shown lines, but for numbers and the text that the model writes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    scripts = runpy.run_path(str(ROOT / "scripts" / "refresh_outputs.py"))
    page = read("README.md")
    today = scripts["refresh"](page, scripts["run_in"](tmp_path))

    def form(text):
        written = re.compile(r"(\$ resolvent generate [^\n]*\n).*?(?=\n\$ )", re.DOTALL)
        return re.sub(r"[\d.,:]+", "#", re.sub(r" +", " ", written.sub(r"\1", text)))

    assert len(scripts["commands"](page)) == 4
    assert form(today) == form(page)
    assert (tmp_path / "runs" / "first" / "inspection.html").exists()


def test_outputs_are_replaced_command_by_command():
    refresh = runpy.run_path(str(ROOT / "scripts" / "refresh_outputs.py"))["refresh"]
    page = "a\n```console\n$ one\nold\n$ two\n...\nold\n```\nb\n```\n$ three\n```\n"
    expected = "a\n```console\n$ one\n1\n2\n$ two\n...\n2\n```\nb\n```\n$ three\n```\n"
    assert refresh(page, lambda command: "1\n2\n") == expected


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page):
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', read(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)) + pictures:
        if "://" not in target:
            path, _, section = target.partition("#")
            found = (ROOT / page).parent / path if path else ROOT / page
            assert found.exists(), target
            assert not section or section in sections(found.read_text(encoding="utf-8")), target


def sections(text):
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


NUMBER = re.compile(r"(?<![\w.,])(\d[\d,]*)(\.\d+)?( KB)?")


def figures(text):
    """The numbers of a text, and those in kilobytes also in megabytes."""
    for whole, part, kilobytes in NUMBER.findall(text):
        number = Decimal(whole.replace(",", "") + part)
        yield number
        if kilobytes:
            yield number * 1024 / 1_000_000


def test_first_figures_of_readme_and_documentation_are_measured_ones():
    """Numbers of the first table, costs of presets and numbers of the first page are measured ones, rounded."""
    page = read("README.md")
    first = page[page.index("| it wins") : page.index("## Quick start")]
    costs = ["".join(line.split("|")[-3:]) for line in page.splitlines() if re.match(r"\| `(base|large)", line)]
    measured = {*figures(read("docs/evidence.md") + read("docs/speed.md"))}
    start = re.search(r"^With 30M parameters.*?\n\n", read("docs/index.md"), re.DOTALL | re.MULTILINE)[0]
    told = [*figures(first), *figures("\n".join(costs)), *figures(start)]
    assert len(told) > 30
    for number in told:
        rounded = {each.quantize(number, ROUND_HALF_UP) for each in measured if each < 1_000_000}
        assert number in rounded, number


def test_citation_has_this_version_and_the_title_of_the_package():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == __version__ and citation["title"].startswith("resolvent: ")
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["license"] == "Apache-2.0"


@pytest.mark.slow
@pytest.mark.parametrize("example", ["phase2_factory_demo.py"])
def test_examples_run(example, monkeypatch):
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")


@pytest.mark.slow
def test_the_demo_beats_a_3_gram_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "60", "--out", str(tmp_path / "demo")])
    monkeypatch.syspath_prepend(ROOT / "examples")  # as `python examples/demo.py` has it
    runpy.run_path(str(ROOT / "examples/demo.py"), run_name="__main__")
    shown = capsys.readouterr().out
    scores = re.findall(r"│\s+(\d\.\d{3})\s+│", shown)
    assert len(scores) == 2
    assert float(scores[1]) < float(scores[0])


def test_pictures_of_the_readme_are_those_of_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_readme", str(tmp_path)])
    runpy.run_path(str(ROOT / "scripts" / "draw_readme.py"), run_name="__main__")
    names = ["block.svg", "results.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_text("utf-8") == read(f"docs/images/{name}")


@pytest.mark.parametrize(("page", "digits"), [("README.md", 3), ("docs/evidence.md", 4)])
def test_losses_on_pages_are_those_of_the_records(page, digits):
    from experiments.quality.report import average, losses
    from experiments.quality.results import read as read_runs

    runs = read_runs([ROOT / "experiments" / "quality" / "results" / "mixed.jsonl"])
    rows = [row for rows in losses(runs) for row in rows if len(row.values) == 3]
    assert {row.name for row in rows} == {"transformer", "phase2", "phase2/hybrid/window-512", "phase2/attention"}
    for row in rows:
        assert average(row.values, digits) in read(page), row.name
