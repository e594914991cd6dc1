"""The engine: answers equal those of single runs, whoever else is in the batch."""

import copy
import queue
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from resolvent.models import decoding, reading
from resolvent.models.sampling import RowSampler, SamplingOptions
from resolvent.serving import engine as engine_module
from resolvent.serving.engine import Engine
from resolvent.serving.requests import DeadlineError, Failure, OverloadedError, Request
from resolvent.serving.runner import CapturedRunner
from tests.models.graphs import launched
from tests.models.small import FULL, HYBRID, PHASE1, PHASE2

BLOCK = 16
CPU = torch.device("cpu")


class Inbox:
    """Events of one request."""

    def __init__(self) -> None:
        self.events: queue.Queue = queue.Queue()

    def answers(self, count: int = 1) -> list[list[int]]:
        """Return the tokens of all answers, once they are complete."""
        return [[event.token for event in events] for events in self.complete(count)]

    def complete(self, count: int = 1) -> list[list]:
        """Return the events of all answers, once they are complete."""
        found, left = [[] for _ in range(count)], count
        while left:
            event = self.events.get(timeout=60)
            if isinstance(event, Failure):
                raise event.error
            found[event.answer].append(event)
            left -= event.finish is not None
        return found


def submit(engine: Engine, prompt: np.ndarray, **options) -> tuple[Inbox, object]:
    """Submit a request; options that are none of ``Request`` are of sampling."""
    own = {name: options.pop(name) for name in ("ends", "logprobs", "seconds", "seeds") if name in options}
    request = Request(
        tokens=prompt,
        max_tokens=options.pop("max_tokens", 12),
        options=SamplingOptions(**options),
        **{"seeds": [0], **own},
    )
    inbox = Inbox()
    return inbox, engine.submit([request], [inbox.events.put])[0]


def alone(model, prompt: np.ndarray, max_tokens: int = 12, **options) -> list[int]:
    """Return the answer of ``generate``."""
    ids = torch.from_numpy(prompt)[None].to(model.lm_head.weight.device)
    return model.generate(ids, max_tokens, **options)[0, len(prompt) :].tolist()


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, length)


PHASES = dict(phase1=PHASE1, phase2=PHASE2, hybrid=HYBRID, full=FULL)
every_model = pytest.mark.parametrize("model", PHASES.values(), ids=PHASES.keys(), indirect=True)


@pytest.fixture(scope="module", params=[HYBRID], ids=["hybrid"])
def model(request):
    torch.manual_seed(0)
    return request.param.model()


@pytest.fixture
def engine(model) -> Iterator[Engine]:
    engine = Engine(model, max_sequences=8, max_queue=20, cache_bytes=1 << 24, block=BLOCK)
    engine.start()
    yield engine
    engine.close()
    assert not engine.alive


OPTIONS = [
    dict(temperature=0),
    dict(temperature=0.8, top_k=20),
    dict(top_p=0.9),
    dict(min_p=0.05, repetition_penalty=1.3),
    dict(presence_penalty=1.0, frequency_penalty=0.3),
]


@every_model
def test_ragged_requests_equal_single_runs(engine, model):
    prompts = [prompt_of(3 + 7 * i, seed=i) for i in range(12)]
    options = [OPTIONS[i % len(OPTIONS)] | dict(max_tokens=5 + 3 * i) for i in range(12)]
    inboxes = [submit(engine, p, seeds=[i], **o)[0] for i, (p, o) in enumerate(zip(prompts, options, strict=True))]
    found = [inbox.answers()[0] for inbox in inboxes]
    assert found == [alone(model, p, seeds=[i], **o) for i, (p, o) in enumerate(zip(prompts, options, strict=True))]
    assert engine.counters.steps < sum(map(len, found)) / 2  # they were written together


def test_several_answers_to_one_prompt_are_read_once(engine, model):
    prompt = prompt_of(BLOCK - 1)
    found = submit(engine, prompt, seeds=[3, 4, 5])[0].answers(3)
    assert found == [alone(model, prompt, seeds=[seed]) for seed in (3, 4, 5)]
    assert engine.counters.read == BLOCK - 1


def test_answer_ends_with_its_end_token(engine, model):
    prompt = prompt_of(9)
    free = alone(model, prompt, seeds=[0])
    events = submit(engine, prompt, ends=frozenset({free[4]}))[0].complete()[0]
    last = free.index(free[4])
    assert [event.token for event in events] == free[: last + 1]
    assert [event.finish for event in events] == [None] * last + ["stop"]
    assert submit(engine, prompt, max_tokens=1)[0].complete()[0][0].finish == "length"


@every_model
def test_log_probabilities_equal_those_of_generate(engine, model):
    prompt = prompt_of(20)
    with_others = submit(engine, prompt_of(5), max_tokens=20)[0]
    events = submit(engine, prompt, logprobs=3, seeds=[2])[0].complete()[0]
    draws = model.draws(torch.from_numpy(prompt)[None], 12, seeds=[2], logprobs=3)
    for event, draw in zip(events, draws, strict=True):
        assert event.logprob == pytest.approx(draw.logprob.item(), abs=1e-4)
        assert [token for token, _ in event.top] == draw.top_tokens[0].tolist()
        assert [value for _, value in event.top] == pytest.approx(draw.top_logprobs[0].tolist(), abs=1e-4)
    assert all(event.logprob is None and event.top == () for event in with_others.complete()[0])


@every_model
def test_prefix_from_the_cache_equals_reading_it_to_the_bit(model):
    document, questions = prompt_of(5 * BLOCK + 3), [prompt_of(4 + i, seed=i + 1) for i in range(4)]
    prompts = [np.concatenate([document, question]) for question in questions]
    events = {}
    for cache_bytes in (0, 1 << 24):
        engine = Engine(model, cache_bytes=cache_bytes, block=BLOCK)
        engine.start()
        events[cache_bytes] = [submit(engine, prompt, logprobs=5)[0].complete()[0] for prompt in prompts]
        whole = sum(map(len, prompts))
        reused = 5 * BLOCK * (len(prompts) - 1)
        expected = (whole, 0) if cache_bytes == 0 else (whole - reused, reused)
        assert (engine.counters.read, engine.counters.cached) == expected
        engine.close()
    assert events[0] == events[1 << 24]  # log probabilities among them


def test_prompt_of_whole_blocks_leaves_a_token_to_read(engine, model):
    prompt = prompt_of(2 * BLOCK)
    for _ in range(2):
        assert submit(engine, prompt)[0].answers()[0] == alone(model, prompt, seeds=[0])
    assert engine.counters.cached == BLOCK


def test_long_prompt_does_not_stop_others(engine):
    short, _ = submit(engine, prompt_of(4), max_tokens=400)
    short.events.get(timeout=60)
    long, _ = submit(engine, prompt_of(100 * BLOCK), max_tokens=1)
    long.complete()
    written = short.events.qsize()
    assert written >= 90  # about a token per block


def test_cancelled_request_frees_its_place(engine, model):
    _, ticket = submit(engine, prompt_of(5), seeds=range(8), max_tokens=100_000)
    waiting, _ = submit(engine, prompt_of(6))
    time.sleep(0.1)
    assert engine.waiting == 1 and engine.running == 8
    ticket.cancel()
    assert waiting.answers()[0] == alone(model, prompt_of(6), seeds=[0])


def test_queue_has_a_limit_and_takes_all_or_nothing(engine):
    _, ticket = submit(engine, prompt_of(5), seeds=range(8), max_tokens=100_000)
    while engine.waiting:
        time.sleep(0.01)
    request = Request(tokens=prompt_of(3), max_tokens=1, options=SamplingOptions(), seeds=[0])
    inboxes = [Inbox() for _ in range(20)]
    engine.submit([request] * 15, [inbox.events.put for inbox in inboxes[:15]])
    with pytest.raises(OverloadedError, match="15 requests wait already, and 20 may"):
        engine.submit([request] * 6, [inbox.events.put for inbox in inboxes[:6]])
    assert engine.waiting == 15
    ticket.cancel()
    for inbox in inboxes[:15]:
        inbox.complete()


def test_request_fails_after_its_time(engine):
    inbox, _ = submit(engine, prompt_of(5), max_tokens=1_000_000, seconds=0.2)
    with pytest.raises(DeadlineError, match=r"longer than 0.2 s"):
        inbox.complete()
    assert submit(engine, prompt_of(5))[0].answers()


def test_more_answers_than_places_are_refused(engine):
    with pytest.raises(ValueError, match="9 answers to one prompt are more than the 8 places"):
        submit(engine, prompt_of(5), seeds=range(9))


def test_failing_step_fails_its_requests_alone(engine, model, monkeypatch, caplog):
    inbox, _ = submit(engine, prompt_of(5), max_tokens=1_000_000)
    inbox.events.get(timeout=60)
    with monkeypatch.context() as patch:
        for part in ("logits", "hidden_states"):  # of a step, and of reading a prompt
            patch.setattr(engine._model, part, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            inbox.complete()
        with pytest.raises(ZeroDivisionError):
            submit(engine, prompt_of(5))[0].complete()
    assert "a step of 1 sequences failed" in caplog.text
    assert submit(engine, prompt_of(5))[0].answers()[0] == alone(model, prompt_of(5), seeds=[0])


def test_failing_join_leaves_the_batch_alone(engine, model, monkeypatch):
    """A new sequence that only the runner had would shift the logits of the others."""
    inbox, _ = submit(engine, prompt_of(5), max_tokens=300)
    first = inbox.events.get(timeout=60)
    with monkeypatch.context() as patch:
        patch.setattr(RowSampler, "cat", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            submit(engine, prompt_of(7, seed=1))[0].complete()
    assert [first.token, *inbox.answers()[0]] == alone(model, prompt_of(5), 300, seeds=[0])


def test_closing_fails_what_is_not_answered(model):
    engine = Engine(model)
    engine.start()
    inbox, _ = submit(engine, prompt_of(5), max_tokens=1_000_000)
    inbox.events.get(timeout=60)
    threading.Thread(target=engine.close).start()
    with pytest.raises(OverloadedError, match="shut down"):
        inbox.complete()
    with pytest.raises(OverloadedError, match="shuts down"):
        submit(engine, prompt_of(5))


@pytest.mark.parametrize("model", [PHASE1, HYBRID], ids=["phase1", "hybrid"], indirect=True)
def test_slots_of_captured_steps_equal_single_runs(model, monkeypatch):
    for module in (reading, decoding):
        monkeypatch.setattr(module, "captured", launched)
    monkeypatch.setattr(engine_module, "make_runner", lambda model, *sizes: CapturedRunner(model, CPU, *sizes))
    engine = Engine(model, max_sequences=6, max_queue=20, cache_bytes=1 << 24, block=BLOCK)
    engine.start()
    try:
        prompts = [prompt_of(3 + 5 * i, seed=i) for i in range(10)]
        options = [OPTIONS[i % len(OPTIONS)] | dict(max_tokens=14 - i, seeds=[i]) for i in range(10)]
        inboxes = [submit(engine, p, **o)[0] for p, o in zip(prompts, options, strict=True)]
        found = [inbox.answers()[0] for inbox in inboxes]
        assert found == [alone(model, p, **o) for p, o in zip(prompts, options, strict=True)]
        assert {*engine._runner._steps} <= {1, 2, 4, 6}
    finally:
        engine.close()


@pytest.mark.gpu
@every_model
def test_captured_batches_equal_single_runs(model):
    """On CUDA, sequences join and leave without a new capture; the answers stay those of single runs."""
    model = copy.deepcopy(model).cuda()
    engine = Engine(model, max_sequences=8, max_queue=40, cache_bytes=1 << 24, block=BLOCK)
    engine.start()
    try:
        prompts = [prompt_of(3 + 7 * i, seed=i) for i in range(12)]
        options = [OPTIONS[i % len(OPTIONS)] | dict(max_tokens=5 + 3 * i, seeds=[i]) for i in range(12)]
        for _ in range(2):  # the second time, the prompts are in the cache
            inboxes = [submit(engine, p, **o)[0] for p, o in zip(prompts, options, strict=True)]
            found = [inbox.answers()[0] for inbox in inboxes]
            assert found == [alone(model, p, **o) for p, o in zip(prompts, options, strict=True)]
        if isinstance(engine._runner, CapturedRunner):
            assert len(engine._runner._steps) <= 4  # for 1, 2, 4 and 8 sequences
        else:
            assert model.state_grows
    finally:
        engine.close()
