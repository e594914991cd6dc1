import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import cpu_speed
import pytest
import torch
from cpu_speed import OURS, TRANSFORMER, OurReader, Row, TransformerReader, create, generate, random_ids
from typer.testing import CliRunner

SCRIPT = Path(cpu_speed.__file__)


def app() -> cpu_speed.typer.Typer:
    app = cpu_speed.typer.Typer()
    app.command()(cpu_speed.main)
    return app


def test_jobs_take_turns_after_a_warm_up():
    calls: list[str] = []
    seconds = cpu_speed.median_seconds({name: partial(calls.append, name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "ab" * cpu_speed.WARM_UPS + "ab" + "ba" + "ab"
    assert set(seconds) == {"a", "b"}
    assert all(0 < value < 1 for value in seconds.values())


def test_other_work_on_the_machine_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter([0.0, 1e6, 0.0, 0.0])
    monkeypatch.setattr(cpu_speed, "cpu_seconds_of_others", lambda: next(clock))
    cpu_speed.median_seconds({"a": lambda: None}, rounds=1)
    assert "other processes used" in capsys.readouterr().out
    cpu_speed.median_seconds({"a": lambda: None}, rounds=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [OURS, TRANSFORMER])
def test_a_round_of_generation_repeats_itself(name: str):
    """Each round starts again after what was read, and what was read in pieces counts as a whole."""
    model, ids = create(name, "tiny").eval(), random_ids("tiny", 30)
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        if name == OURS:
            reader = OurReader(model, ids, piece=7)
        else:
            reader = TransformerReader(model, ids, piece=7, room=5)
        read = reader.read
        reader.read = lambda token: seen.append(read(token)) or seen[-1]
        generate(reader, 5)
        generate(reader, 5)
        expected = model(torch.cat([ids, torch.zeros(1, 1, dtype=torch.int64)], dim=1))[:, -1:]
    assert all(torch.equal(first, second) for first, second in zip(seen[:5], seen[5:], strict=True))
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)


def test_one_pass_equals_token_by_token():
    assert cpu_speed.largest_difference("tiny", torch.get_num_threads()) <= cpu_speed.TOLERANCE


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch, difference: float):
    monkeypatch.setattr(cpu_speed, "in_fresh_process", lambda *_: difference)
    monkeypatch.setattr(cpu_speed, "measure_memory", lambda *_: pytest.fail("measured a wrong model"))
    result = CliRunner().invoke(app(), ["--quick"])
    assert result.exit_code == 1, result.output


def test_the_table_says_what_is_met(capsys: pytest.CaptureFixture[str]):
    rows = [Row("speed", "tokens/s", 1500, 1000, "ratio >= 1.0", True), Row("time", "ms", 3, 2, "ours <= 1.1", False)]
    cpu_speed.console.print(cpu_speed.as_table(rows, "title"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "ms" in line] == [
        ["time", "ms", "3.00", "2.00", "1.50", "ours", "<=", "1.1", "missed"]
    ]
    assert [line.split() for line in lines if "speed" in line] == [
        ["speed", "tokens/s", "1,500", "1,000", "1.50", "ratio", ">=", "1.0", "met"]
    ]


@pytest.mark.slow
def test_runs_from_end_to_end(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--json", str(tmp_path / "figures.json")]
    subprocess.run(command, check=True, timeout=300)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in figures["rows"]] == [
        "training, N = 64",
        "training, N = 128",
        "token after 20",
        "token after 200",
        "after 200 / 20",
        "memory, N = 64",
        "memory, N = 128",
    ]
    assert all(row[name] > 0 for row in figures["rows"] for name in ("ours", "transformer", "ratio"))
    assert figures["threads"] == 1
