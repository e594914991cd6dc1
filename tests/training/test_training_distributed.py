"""Training by two processes on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resolvent.training import TrainingConfig, train


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_second", None)
    return records


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batches(small_config: Callable[..., TrainingConfig], tmp_path: Path):
    model = small_config().model
    assert model is not None
    model.dropout = 0.0
    alone = small_config(model=model, out=str(tmp_path / "alone"), accumulation=4)
    shared = small_config(model=model, out=str(tmp_path / "shared"), accumulation=2)
    train(alone)
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\n"
        "from resolvent.training import TrainingConfig, train\n"
        "train(TrainingConfig.from_dict(json.loads(sys.argv[1])))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(program), json.dumps(shared.to_dict())]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = metrics(tmp_path / "alone"), metrics(tmp_path / "shared")
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one == pytest.approx(two, rel=1e-3)
