"""Tables, and figures as JSON."""

import io
import json
import math
import os
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from resolvent.cli import console as output
from resolvent.cli.console import STDOUT, progress_console, report_console, show_table, status, write_result

COLUMNS = ("tokens read", "texts", "predicted", "loss", "perplexity", "bits per byte", "in windows", "gain")
ROW = ("1 - 2", "4,512", "65,536", "1.2345 ± 0.1234", "1,227.035", "1.1234", "7.5678 ± 0.5678", "+8.9012 ± 0.9012")


def shown(width: int, *, encoding: str = "utf-8", columns=COLUMNS, rows=(ROW,), **options) -> str:
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding=encoding) as file:
        show_table(Console(file=file, width=width), columns, rows, **options)
        file.flush()
        return written.getvalue().decode(encoding)


@pytest.mark.parametrize("width", range(1, 140, 7))
def test_figures_are_whole_at_any_width(width: int):
    page = shown(width)
    assert set(" ".join([*COLUMNS, *ROW]).split()) <= set(page.split())
    assert "…" not in page


@pytest.mark.parametrize("width", [80, 100])
def test_a_narrow_terminal_gets_headings_and_errors_on_lines_of_their_own(width: int):
    page = shown(width)
    assert "1 - 2 " in page
    assert max(map(len, page.splitlines())) <= width


def test_a_wide_terminal_gets_a_line_for_every_row():
    assert [line.split() for line in shown(200).splitlines()] == [" ".join(part).split() for part in (COLUMNS, ROW)]


def test_text_folds_and_figures_do_not():
    name = "blocks.1.mixer.projection.weight"
    page = shown(40, columns=("tensor", "parameters"), rows=[(name, "123,456,789,012,345")], text=("tensor",))
    lines = page.splitlines()
    assert max(map(len, lines)) <= 40 and "123,456,789,012,345" in page
    assert "".join(line[:20].strip() for line in lines[1:]) == name


def test_names_fold_at_their_parts_and_prose_at_blanks():
    rows = [("blocks.*.gate_down.weight", "1", "no memory until training asks for it"), ("ln_f.bias", "22", "copied")]
    page = shown(44, columns=("tensor", "number", "origin"), rows=rows, text=("tensor", "origin"))
    assert [line.rstrip() for line in page.splitlines()] == [
        "tensor        number  origin",
        "blocks.*.          1  no memory until",
        "  gate_down.          training asks for it",
        "  weight",
        "ln_f.bias         22  copied",
    ]


def test_short_text_leaves_its_room_to_long_text():
    rows = [("tiny", "a" * 20 + "." + "b" * 20)]
    page = shown(50, columns=("preset", "description"), rows=rows, text=("preset", "description"))
    assert page.splitlines()[1].rstrip() == "tiny    " + rows[0][1]


@pytest.mark.parametrize("width", range(1, 60, 5))
@pytest.mark.parametrize("cell", ["", " a  b ", "blocks.1.mixer.projection.weight", "字" * 30, "a" * 50, "x/y_z-" * 9])
def test_folding_loses_no_character(width: int, cell: str):
    page = shown(width, columns=("text",), rows=[(cell,)], text=("text",))
    assert "".join("".join(page.splitlines()[1:]).split()) == cell.replace(" ", "")
    assert all(cell_len(line) <= max(width, 12) for line in page.splitlines())


def test_figures_degrade_to_what_the_encoding_has():
    page = shown(200, encoding="ascii")
    assert "1.2345 +- 0.1234" in page
    heading, row = page.splitlines()
    assert heading.index("perplexity") + len("perplexity") == row.index("1,227.035") + len("1,227.035")
    narrow = shown(80, encoding="ascii").splitlines()
    assert "+- 0.9012" in narrow[-1] and max(map(len, narrow)) <= 80


def test_cells_are_shown_as_they_are():
    page = shown(200, columns=("[bold]", ":cat:"), rows=[("c[/y]", ":dog:")], text=("[bold]", ":cat:"))
    assert page.split() == ["[bold]", ":cat:", "c[/y]", ":dog:"]


def test_a_table_keeps_the_width_of_its_console():
    console = Console(file=io.StringIO(), width=20)
    show_table(console, COLUMNS, [ROW])
    assert console.width == 20


def test_results_go_to_a_file_or_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    values = {"a": [1, 2.5, math.nan], "b": {"c": -math.inf, "d": (None, "\udcff")}}
    expected = {"a": [1, 2.5, None], "b": {"c": None, "d": [None, "\udcff"]}}
    write_result(tmp_path / "found.json", values)
    assert json.loads((tmp_path / "found.json").read_text()) == expected
    write_result(STDOUT, values)
    out = capsys.readouterr().out
    assert json.loads(out) == expected and out.count("\n") == 1
    write_result(None, values)
    assert not capsys.readouterr().out


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_result(pipe, {"a": 1})
        assert pipe.is_fifo() and json.loads(os.read(reader, 100)) == {"a": 1}
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_json_takes_the_place_of_reports_and_moves_progress_to_stderr():
    assert report_console(STDOUT).quiet and not report_console(Path("x")).quiet
    assert progress_console(STDOUT).stderr and not progress_console(None).stderr


def test_output_that_is_no_terminal_is_not_folded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert report_console(None).width > 1000
    monkeypatch.setenv("COLUMNS", "33")
    assert report_console(None).width == 33


def test_a_status_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    monkeypatch.setattr(output, "make_console", lambda **_: console)
    with status("Reading c[/y] :cat:"):
        pass
    assert "Reading c[/y] :cat:" in console.file.getvalue()
