import json
from pathlib import Path

import pytest

from resolvent.errors import CheckpointError
from resolvent.training.average import Average
from resolvent.training.files import atomic_directory, read_json, write_json
from resolvent.training.metrics import MetricsLog


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    target = tmp_path / "step"
    with atomic_directory(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_does_not_appear_when_filling_it_fails(tmp_path: Path):
    target = tmp_path / "step"

    def fail() -> None:
        with atomic_directory(target) as partial:
            (partial / "old").write_text("1")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert not target.exists()
    with atomic_directory(target) as partial:  # the remains are no part of the next attempt
        (partial / "new").write_text("2")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_json_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("{", "cannot read"), ("[]", "JSON object")])
def test_damaged_json_is_a_checkpoint_error(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_metrics_drop_what_is_beyond_a_checkpoint(tmp_path: Path):
    with MetricsLog(tmp_path, last_step=0) as log:
        for step in range(1, 6):
            log.write(step=step, loss=1.0 / step)
        log.write(step=3, validation_loss=2.0, final=False)
        log.write(step=3, validation_loss=2.0, final=True)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')  # cut off by a crash
    with MetricsLog(tmp_path, last_step=3) as log:
        log.write(step=4, loss=0.5)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 3, 4]
    assert not any(record.get("final") for record in records)
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_are_in_the_file_at_once(tmp_path: Path):
    with MetricsLog(tmp_path, last_step=0) as log:
        log.write(step=1)
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_disabled_log_writes_nothing(tmp_path: Path):
    with MetricsLog(tmp_path, last_step=0, enabled=False) as log:
        log.write(step=1)
        log.sync()
    assert not any(tmp_path.iterdir())


def test_an_average_is_not_drawn_to_its_start():
    average = Average(decay=0.9)
    assert [average.update(5.0) for _ in range(20)] == pytest.approx([5.0] * 20)
    assert 5.0 < average.update(6.0) < 5.2
