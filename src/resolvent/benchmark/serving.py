"""Serving: tokens per second of many answers at once, beside a loop of ``generate``.

The engine reads ragged prompts and writes greedy answers of equal lengths; the time of reading is included. The peer
answers the same prompts one after the other, a few of them where there are many: its speed does not depend on their
number.
"""

import queue
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from resolvent.benchmark import training
from resolvent.benchmark.harness import Bench, Check, Measurement, Scale
from resolvent.benchmark.report import Target
from resolvent.benchmark.timing import synchronize
from resolvent.models.phase2 import Phase2IntegratedModel
from resolvent.models.sampling import SamplingOptions
from resolvent.serving.engine import Engine
from resolvent.serving.requests import Failure, Request, TokenEvent

SECTION = "serving"
_SHORTEST, _LONGEST = 8, 64
"""Tokens of the prompts."""
_ALONE = 4
"""Answers of the peer."""


@dataclass(frozen=True)
class Case:
    """Answers of a preset.

    Attributes:
        sequences: numbers of answers at once.
        tokens: tokens of an answer.
        speedups: targets for our speed over the peer's, by number of answers.
    """

    preset: str
    sequences: tuple[int, ...]
    tokens: int
    speedups: dict[int, Target]


CASES = {
    "cuda": Case("base", (1, 8, 64, 256), 128, {}),
    "cpu": Case("tiny", (1, 8, 64), 64, {64: Target(4.0, at_most=False)}),
    "quick": Case("tiny", (3,), 6, {}),
}


def measurements(scale: Scale) -> list[Measurement]:
    """Return measurements of the engine with few and many requests."""
    case = CASES[scale]
    return [
        Measurement(SECTION, _name(case, count), partial(_measure, case=case, sequences=count))
        for count in case.sequences
    ]


def _name(case: Case, sequences: int) -> str:
    return f"{case.preset}, {sequences} answers of {case.tokens} tokens"


def _measure(bench: Bench, case: Case, sequences: int) -> None:
    name = _name(case, sequences)
    outcome = bench.measure(
        name,
        partial(_engine_speed, bench, case, sequences),
        {"loop of generate": partial(_loop_speed, bench, case, min(sequences, _ALONE))},
        tolerance=0.1 if bench.dtype == torch.bfloat16 else 2e-4,
    )
    row = bench.add(SECTION, name, "tokens/s", outcome)
    if row.times_better is not None and sequences in case.speedups:
        target = case.speedups[sequences]
        bench.add_figure(SECTION, f"{name}, engine / loop", "times", row.times_better, target)


def _engine_speed(bench: Bench, case: Case, sequences: int, check: Check) -> float:
    """Return tokens per second, from the first request to the last token; a first round is not timed."""
    engine = Engine(_model(bench, case), max_sequences=sequences, max_queue=sequences, cache_bytes=0)
    engine.start()
    try:
        prompts = _prompts(case, sequences)
        answers = _answers(engine, case, prompts)
        exact = training.new_model(case.preset, bench.device, backend="torch").to(bench.dtype).double().eval()
        check(max(map(partial(_regret, exact), prompts[:_ALONE], answers[:_ALONE])))
        started = time.perf_counter()
        _answers(engine, case, prompts)
        return sequences * case.tokens / (time.perf_counter() - started)
    finally:
        engine.close()


def _answers(engine: Engine, case: Case, prompts: list[np.ndarray]) -> list[list[int]]:
    """Return the tokens of the answers to all prompts, submitted at once."""
    greedy = SamplingOptions(temperature=0)
    requests = [Request(tokens=prompt, max_tokens=case.tokens, options=greedy, seeds=[0]) for prompt in prompts]
    boxes: list[queue.Queue[TokenEvent | Failure]] = [queue.Queue() for _ in prompts]
    engine.submit(requests, [box.put for box in boxes])
    return [[_token(box.get()) for _ in range(case.tokens)] for box in boxes]


def _token(event: TokenEvent | Failure) -> int:
    if isinstance(event, Failure):
        raise event.error
    return event.token


@torch.inference_mode()
def _regret(exact: Phase2IntegratedModel, prompt: np.ndarray, answer: list[int]) -> float:
    """Return how much likelier than an answer's tokens others were, at worst: see ``decoding.regret``."""
    ids = torch.tensor([[*prompt.tolist(), *answer]], device=exact.lm_head.weight.device)
    logits = exact(ids[:, :-1])[0, len(prompt) - 1 :]
    lost = logits.amax(-1) - logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return float((lost / logits.std(-1)).amax())


def _loop_speed(bench: Bench, case: Case, sequences: int) -> float:
    """Return tokens per second of ``generate``, prompt after prompt."""
    model, device = _model(bench, case), bench.device
    prompts: list[Tensor] = [torch.from_numpy(prompt)[None].to(device) for prompt in _prompts(case, sequences)]
    model.generate(prompts[0], case.tokens, temperature=0)
    synchronize(device)
    started = time.perf_counter()
    for prompt in prompts:
        model.generate(prompt, case.tokens, temperature=0)
    synchronize(device)
    return sequences * case.tokens / (time.perf_counter() - started)


def _model(bench: Bench, case: Case) -> Phase2IntegratedModel:
    return training.new_model(case.preset, bench.device).to(bench.dtype).eval()


def _prompts(case: Case, sequences: int) -> list[np.ndarray]:
    """Return random prompts of many lengths, the same every time."""
    random, vocabulary = np.random.default_rng(0), training.configuration(case.preset).vocab_size
    return [random.integers(0, vocabulary, random.integers(_SHORTEST, _LONGEST + 1)) for _ in range(sequences)]
