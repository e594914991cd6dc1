import re
from contextlib import redirect_stdout
from io import StringIO

import pytest
from typer.testing import CliRunner

from experiments import many_gpus
from experiments.many_gpus import WARM_UP, app
from tests.processes import together


def compare_and_train() -> str:
    """Return the output of this process."""
    device = many_gpus.begin()
    with redirect_stdout(StringIO()) as printed:
        many_gpus.compare("tiny", 200, device)
        many_gpus.train("tiny", 200, device)
    return printed.getvalue()


def test_a_sequence_is_compared_and_trained_on():
    out, silence = together(2, compare_and_train)
    assert not silence
    apart = re.search(r"apart by (\S+) at most, (\S+) relative", out)
    assert apart and all(float(number) < 1e-5 for number in apart.groups())
    losses = [float(loss) for loss in re.findall(r"step \d: loss (\S+),", out)]
    assert len(losses) == 2 and losses[1] < losses[0]


@pytest.mark.slow
def test_the_throughput_of_two_processes_is_compared_with_that_of_one():
    sizes = ["--preset", "tiny", "--seq-len", "64", "--batch-size", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, ["throughput", "--steps", str(WARM_UP + 2), *sizes])
    assert result.exit_code == 0, result.output
    assert re.search(r"^1 process: [\d,]+ tokens/s\n2 processes: [\d,]+ tokens/s, \d\.\d+ times", result.output)
