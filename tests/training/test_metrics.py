import json
from pathlib import Path

import pytest

from resolvent.training.average import Average
from resolvent.training.metrics import MetricsLog


def test_metrics_beyond_a_checkpoint_are_dropped(tmp_path: Path):
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


def test_average_is_corrected_for_its_start():
    average = Average(decay=0.9)
    assert [average.update(5.0) for _ in range(20)] == pytest.approx([5.0] * 20)
    assert 5.0 < average.update(6.0) < 5.2
