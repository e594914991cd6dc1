"""Many sequences at once, and long runs: the answers are those of one alone, and memory does not grow."""

import functools
import gc
import importlib
import pkgutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import resolvent
from resolvent.models import IntegratedModel
from resolvent.models.generation import sample
from resolvent.models.state import ModelState
from resolvent.ops.hebbian import _chunk_layout
from resolvent.training import train
from resolvent.training.trainer import Trainer
from tests.models.small import PHASE1, PHASE2, SmallPhase, tokens
from tests.safety.victim import TEXT, minute_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PHASES = pytest.mark.parametrize("phase", [PHASE1, PHASE2], ids=["phase1", "phase2"])
MEBIBYTE = 2**20


class Sequence:
    """A request: a prompt, how many tokens it wants, and randomness of its own."""

    def __init__(self, number: int, device: str) -> None:
        random = torch.Generator().manual_seed(number)
        length, self.wanted = (int(torch.randint(1, most, (), generator=random)) for most in (90, 40))
        self.prompt = torch.randint(97, (1, length), generator=random).to(device)
        self.temperature = float(number % 2)
        self.random = random
        self.written: list[int] = []

    def choose(self, logits: Tensor) -> None:
        self.written.append(int(sample(logits[None].cpu(), self.temperature, generator=self.random)))

    @property
    def done(self) -> bool:
        return len(self.written) == self.wanted


@torch.inference_mode()
def serve(model: IntegratedModel, requests: Iterator[Sequence], at_once: int) -> list[Sequence]:
    """Answer requests, as many at once as there is room for: they join when others leave."""
    answered: list[Sequence] = []
    running: list[Sequence] = []
    state: ModelState | None = None
    while True:
        if len(running) < at_once // 2 or not running:
            joining = [request for _, request in zip(range(at_once - len(running)), requests, strict=False)]
            if joining:
                state = _join(model, joining, state)
                running += joining
        if not running:
            return answered
        leaving = [request for request in running if request.done]
        if leaving:
            answered += leaving
            assert state is not None
            state = state[[i for i, request in enumerate(running) if not request.done]]
            running = [request for request in running if not request.done]
            continue
        last = torch.tensor([[request.written[-1]] for request in running]).to(running[0].prompt)
        logits, state = model(last, state=state, return_state=True)
        for request, row in zip(running, logits[:, -1], strict=True):
            request.choose(row)


def _join(model: IntegratedModel, joining: list[Sequence], state: ModelState | None) -> ModelState:
    """Read prompts of all lengths, packed in one row, and put their states behind the others."""
    lengths = [request.prompt.shape[1] for request in joining]
    ends = torch.tensor(lengths).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    packed = torch.cat([request.prompt for request in joining], dim=1)
    logits, new = model(packed, cu_seqlens=offsets, return_state=True)
    for request, end in zip(joining, ends, strict=True):
        request.choose(logits[0, end - 1])
    return new if state is None or not len(state) else type(new).cat([state, new])


def assert_served_as_alone(phase: SmallPhase, device: str, requests: int, at_once: int, compared: int) -> None:
    model = phase.model().to(device)
    served = serve(model, (Sequence(i, device) for i in range(requests)), at_once)
    assert len(served) == requests
    by_prompt = {tuple(request.prompt[0].tolist()): request.written for request in served}
    for number in torch.randperm(requests)[:compared].tolist():
        request = Sequence(number, device)
        alone = model.generate(
            request.prompt, request.wanted, temperature=request.temperature, generator=request.random
        )
        assert by_prompt[tuple(request.prompt[0].tolist())] == alone[0, request.prompt.shape[1] :].tolist()


@PHASES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_joining_and_leaving_sequences_equal_single_ones(phase: SmallPhase, at_once: int, device: str):
    assert_served_as_alone(phase, device, requests=3 * at_once, at_once=at_once, compared=12)


@pytest.mark.slow
@PHASES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [128, 512])
def test_many_sequences_equal_single_ones(phase: SmallPhase, at_once: int, device: str):
    assert_served_as_alone(phase, device, requests=3 * at_once, at_once=at_once, compared=200)


@torch.no_grad()
@PHASES
def test_joined_states_are_those_of_the_sequences(phase: SmallPhase):
    model = phase.model()
    states = [model(tokens(length, batch), return_state=True)[1] for length, batch in ((70, 2), (1, 1), (64, 3))]
    joined = phase.state.cat(states)
    assert len(joined) == 6 and joined.position.tolist() == [70, 70, 1, 64, 64, 64]
    for found, expected in zip(joined[[2]].tensors(), states[1].tensors(), strict=True):
        assert torch.equal(found, expected)
    ids = tokens(5, 6)
    torch.testing.assert_close(model(ids, state=joined)[3:], model(ids[3:], state=states[2]), rtol=1e-4, atol=1e-4)
    assert len(joined[[]]) == 0
    with pytest.raises(ValueError, match="no state to join"):
        phase.state.cat([])
    with pytest.raises(ValueError, match="belong to different models"):
        phase.state.cat([states[0], phase.model(n_layers=2)(tokens(3), return_state=True)[1]])


# -------------------------------------------------------------------------------------------------- memory over time


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Growth:
    """Growth of memory since ``begin``: of Python's objects, traced from the start of the block, and of the process.

    A traced block of a mebibyte and more does not count. Python's table of interned strings is one, and moves now and
    then from where it was before the tracing; what else grows as far in one piece shows in the process.
    """

    def __enter__(self) -> "Growth":
        tracemalloc.start()
        return self

    def __exit__(self, *exception: object) -> None:
        tracemalloc.stop()

    def begin(self) -> None:
        self.snapshot = tracemalloc.take_snapshot()
        self.before = self._look()

    def assert_none(self, python: int, process: int) -> None:
        grown = [after - before for after, before in zip(self._look(), self.before, strict=True)]
        if grown[0] > python or grown[1] > process:
            lines = tracemalloc.take_snapshot().compare_to(self.snapshot, "lineno")[:10]
            pytest.fail("\n".join([f"grown by {grown[0]:,} and {grown[1]:,} bytes", *map(str, lines)]))

    def _look(self) -> tuple[int, int]:
        gc.collect()
        sizes = (trace.size for trace in tracemalloc.take_snapshot().traces)
        return sum(size for size in sizes if size < MEBIBYTE), resident()


def test_growth_is_detected_and_named():
    kept: list[bytes] = []
    with Growth() as growth:
        growth.begin()
        kept.append(bytes(MEBIBYTE))
        growth.assert_none(python=128 * 1024, process=8 * MEBIBYTE)
        for more in ([bytes(100) for _ in range(2000)], [bytes(200 * 1024)]):
            kept[1:] = more
            with pytest.raises(pytest.fail.Exception, match=r"grown by [\d,]+ .*\n.*test_load.py"):
                growth.assert_none(python=128 * 1024, process=8 * MEBIBYTE)


def assert_training_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_up: int, steps: int) -> None:
    data = tmp_path / "verses.txt"
    data.write_text(TEXT)
    config = minute_config(data, tmp_path / "run")
    config.steps, config.eval_interval, config.checkpoint_interval = warm_up + steps, 0, 0
    report = Trainer._report
    growth = Growth()

    def look(self: Trainer, *values: float) -> None:
        report(self, *values)
        if self.state.step == warm_up:
            growth.begin()
        if self.state.step == warm_up + steps:
            growth.assert_none(python=128 * 1024, process=8 * MEBIBYTE)

    monkeypatch.setattr(Trainer, "_report", look)
    with growth:
        train(config)


def test_training_takes_no_more_memory_with_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert_training_is_flat(tmp_path, monkeypatch, warm_up=40, steps=50)


@pytest.mark.slow
def test_ten_thousand_steps_take_no_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert_training_is_flat(tmp_path, monkeypatch, warm_up=200, steps=10_000)


@torch.inference_mode()
def stream(model: IntegratedModel, state: ModelState | None, count: int) -> ModelState | None:
    """Read tokens one by one, with a piece of another length now and then."""
    for i in range(count):
        _, state = model(tokens(1 if i % 50 else 1 + i % 97, 1), state=state, return_state=True)
    return state


def assert_streaming_is_flat(phase: SmallPhase, warm_up: int, count: int) -> None:
    model = phase.model(n_layers=1)
    with Growth() as growth:
        state = stream(model, None, warm_up)
        growth.begin()
        stream(model, state, count)
        growth.assert_none(python=128 * 1024, process=8 * MEBIBYTE)


@PHASES
def test_streaming_takes_no_more_memory_with_time(phase: SmallPhase):
    assert_streaming_is_flat(phase, warm_up=300, count=300)


@pytest.mark.slow
@PHASES
def test_a_hundred_thousand_tokens_take_no_more_memory(phase: SmallPhase):
    assert_streaming_is_flat(phase, warm_up=5000, count=100_000)


@pytest.mark.gpu
@PHASES
def test_the_allocator_of_cuda_is_flat(phase: SmallPhase):
    """Training steps on batches of many shapes, and streaming."""
    model = phase.model().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def steps(count: int) -> None:
        for i in range(count):
            ids = tokens(64 + i % 32).cuda()
            model(ids, labels=ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.generate(tokens(5).cuda(), 100)

    def look() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    steps(100)
    before = look()
    steps(1000)
    allocated, reserved = look()
    assert allocated - before[0] <= MEBIBYTE
    assert reserved - before[1] <= 32 * MEBIBYTE


def caches() -> Iterator[Callable[..., object]]:
    """All functions of the package that remember what they returned."""
    for module in pkgutil.walk_packages(resolvent.__path__, "resolvent."):
        if module.name not in ("resolvent.__main__", "resolvent.hf", "resolvent.models.hf"):
            importlib.import_module(module.name)
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper and thing.__module__.startswith("resolvent."):
            yield thing


def test_every_cache_has_an_end():
    pytest.importorskip("triton")
    found = {f"{cache.__module__}.{cache.__name__}": cache for cache in caches()}
    assert "resolvent.ops.hebbian._chunk_layout" in found
    for name, cache in found.items():
        takes_nothing = cache.__wrapped__.__code__.co_argcount == 0
        assert takes_nothing or cache.cache_parameters()["maxsize"] is not None, name


@torch.no_grad()
def test_layouts_leave_their_cache():
    model = PHASE2.model(n_layers=1)
    for length in range(2, 90):
        model(tokens(length, 1))
    info = _chunk_layout.cache_info()
    assert info.currsize <= info.maxsize == 64
