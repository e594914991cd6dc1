import json
from pathlib import Path

import pytest

from resolvent.benchmark.report import Report, Row, StoredRun, Target, number
from resolvent.benchmark.timing import Ceilings, Work
from resolvent.errors import DataError

LIMITS = Ceilings(bytes_per_second=1e12, flops_per_second=1e14)


def shown(*rows: Row) -> str:
    tables = Report("cuda", "a GPU", LIMITS, list(rows)).tables()
    return "\n".join("\t".join(line) for table in tables for line in ([table.title], table.columns, *table.rows))


def line_of(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if name in line]
    return " ".join(line.split())


@pytest.mark.parametrize(
    ("target", "figures"),
    [
        (Target(2.0, 3.0), {1.9: "met", 2.0: "met", 2.1: "will do", 3.1: "missed"}),
        (Target(2.0), {2.0: "met", 2.1: "missed"}),
        (Target(2.0, 1.5, at_most=False), {2.5: "met", 2.0: "met", 1.6: "will do", 1.4: "missed"}),
        (Target(2.0, at_most=False), {1.99: "missed"}),
    ],
)
def test_target_verdicts(target: Target, figures: dict[float, str]):
    assert {figure: target.verdict(figure) for figure in figures} == figures


def test_a_row_compares_with_the_best_peer():
    assert Row("s", "n", "ms", 2.0, {"a": 8.0, "b": 6.0}).times_better == 3.0
    assert Row("s", "n", "GiB", 2.0, {"a": 1.0}).times_better == 0.5
    assert Row("s", "n", "tokens/s", 300.0, {"a": 100.0, "b": 200.0}).times_better == 1.5
    assert Row("s", "n", "tokens/s", 300.0).times_better is None
    assert Row("s", "n", "ms", None, {"a": 1.0}, failures={"ours": "why"}).times_better is None


def test_the_fraction_is_that_of_the_tighter_limit():
    assert Work(num_bytes=1e12).fraction(2.0, LIMITS) == 0.5
    assert Work(num_bytes=1e12, flops=4e14).fraction(8.0, LIMITS) == 0.5


def test_table_has_every_figure():
    row = Row("fast", "op", "ms", 0.05, {"peer": 0.1}, Target(0.055, 0.09), Work(134e6, 8.6e9), 0.84, 2.4e-3)
    failed = Row("fast", "big", "ms", None, {}, Target(1.0), failures={"ours": "OutOfMemoryError: none left"})
    text = shown(row, failed, Row("memory", "step", "GiB", 9.0, target=Target(4.0, 8.0)))
    headers = "unit ours peers times better target (will do) verdict MB GFLOP % of limit error"
    assert headers in " ".join(text.split())
    assert line_of(text, "op") == "op ms 0.05 peer 0.1 2.00 <= 0.055 (0.09) met 134 8.6 84 2e-03"
    assert line_of(text, "big") == "big ms failed <= 1"
    assert line_of(text, "step") == "step GiB 9 <= 4 (8) missed"
    assert [line.strip() for line in text.splitlines() if line.strip() in ("fast", "memory")] == ["fast", "memory"]


def test_empty_columns_are_omitted():
    text = shown(Row("memory", "step", "GiB", 3.0, target=Target(4.0)))
    assert "peers" not in text and "% of limit" not in text


def test_failures_are_listed_with_who_and_why():
    rows = [Row("a", "b", "ms", 1.0, failures={"peer": "refused"}), Row("c", "d", "ms", None, failures={"ours": "why"})]
    report = Report("cuda", "a GPU", LIMITS, rows)
    assert report.failures == ["a, b, peer: refused", "c, d, ours: why"]
    assert "peer failed" in shown(*rows)
    assert report.to_dict()["failures"] == report.failures


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123456, "0.0123"), (1.5, "1.5"), (99.96, "100"), (1234567.8, "1,234,568")]
)
def test_numbers_have_three_digits(value: float, text: str):
    assert number(value) == text


def test_changes_against_a_stored_run(tmp_path: Path):
    before = [Row("a", "fast", "ms", 2.0), Row("a", "failed", "ms", None), Row("a", "gone", "ms", 1.0)]
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(Report("cuda", "a GPU", LIMITS, before).to_dict()))
    stored = StoredRun.read(path)
    now = [Row("a", "fast", "ms", 1.5), Row("a", "failed", "ms", 1.0), Row("b", "fast", "tokens/s", 3000.0)]
    assert (stored.scale, stored.device) == ("cuda", "a GPU")
    assert stored.changes(now).rows == [
        ["a: fast", "ms", "2", "1.5", "-25.0 %"],
        ["a: failed", "ms", "", "1", ""],
        ["b: fast", "tokens/s", "", "3,000", ""],
    ]


def test_stored_run_of_another_kind_is_refused(tmp_path: Path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": [{"name": "x"}]}))
    with pytest.raises(DataError, match=r"other\.json does not hold the figures of a benchmark \('section'\)"):
        StoredRun.read(path)
    path.write_text(json.dumps({"rows": [{"section": "a", "name": "b", "ours": "fast"}], "scale": "cpu"}))
    with pytest.raises(
        DataError, match=r"other\.json does not hold the figures of a benchmark \('fast' is no figure\)"
    ):
        StoredRun.read(path)
