"""Forward passes of the engine without graphs: batches change, and every sequence reads as it would alone."""

import pytest
import torch

from resolvent.models.decoding import read_token
from resolvent.models.phase2.decode_torch import PlainStep
from resolvent.serving.runner import Runner
from tests.models.small import FULL, HYBRID, PHASE1, PHASE2, tokens

PHASES = dict(phase1=PHASE1, phase2=PHASE2, hybrid=HYBRID, full=FULL)


class Batch:
    """A runner, and the states of its sequences read one by one."""

    def __init__(self, model) -> None:
        self.model, self.runner, self.states = model, Runner(model, torch.device("cpu")), []

    def join(self, length: int, count: int) -> None:
        pieces = list(tokens(length, count).numpy())
        _, states = self.runner.read(pieces, [None] * count)
        self.states += [state.clone() for state in states]
        for state in states:
            self.runner.join(state)

    def keep(self, rows: list[int]) -> None:
        self.runner.keep(rows)
        self.states = [self.states[row] for row in rows]

    def check_steps(self, count: int) -> None:
        for _ in range(count):
            token = tokens(1, len(self.states))[:, 0]
            alone = [read_token(self.model, token[i : i + 1], state) for i, state in enumerate(self.states)]
            self.states = [state for _, state in alone]
            expected = torch.cat([logits for logits, _ in alone])
            torch.testing.assert_close(self.runner.step(token), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES.keys())
def test_steps_of_changing_batches_equal_steps_alone(phase):
    torch.manual_seed(0)
    batch = Batch(phase.model())
    batch.join(61, 2)
    batch.check_steps(5)  # the first consolidation
    batch.join(30, 1)
    batch.check_steps(2)
    batch.keep([1, 2])
    batch.check_steps(2)
    batch.keep([])
    batch.join(5, 1)
    batch.check_steps(2)


@torch.inference_mode()
@pytest.mark.parametrize("phase", [PHASE2, HYBRID], ids=["phase2", "hybrid"])
def test_batches_on_the_cpu_take_the_step_of_the_cpu(phase):
    torch.manual_seed(0)
    batch = Batch(phase.model())
    batch.join(5, 2)
    batch.check_steps(1)
    assert isinstance(batch.runner._reader._step, PlainStep)
