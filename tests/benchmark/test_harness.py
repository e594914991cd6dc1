"""Entries of a benchmark: the order of measurement, and failures and wrong results among them."""

import io
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from resolvent.benchmark import decoding, harness, memory, operators, training
from resolvent.benchmark.harness import Bench
from resolvent.benchmark.timing import Ceilings

CPU = torch.device("cpu")
MEMORY = operators.MemoryCase(1, 330, 2, 16, backward=True, consolidated=True)
RESOLVENT = operators.ResolventCase(1, 70, 2, backward=True)
LOSS = operators.LossCase(20, 16, 50)


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, "quick", Ceilings(1e10, 1e11), compiled=False, console=Console(file=io.StringIO()))


def measure_all(section: ModuleType, bench: Bench) -> None:
    for measurement in section.measurements(bench.scale):
        measurement.measure(bench)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is timed; what would have been is counted."""
    jobs: list[str] = []
    monkeypatch.setattr(operators, "milliseconds", lambda make_job, *_: jobs.append(repr(make_job)) or float(len(jobs)))
    return jobs


def test_failed_entry_is_reported_and_others_are_measured(bench: Bench):
    def fail() -> float:
        raise RuntimeError("no memory\nand a long story")

    outcome = bench.measure("x", lambda check: fail(), {"a": lambda: 1.0, "b": fail})
    assert outcome.ours is None and outcome.peers == {"a": 1.0}
    assert outcome.failures == {"ours": "RuntimeError: no memory", "b": "RuntimeError: no memory"}
    row = bench.add("s", "x", "ms", outcome)
    assert row.failures == outcome.failures and bench.rows == [row]
    assert "x: b failed: RuntimeError: no memory" in bench.console.file.getvalue()


def test_debugging_stops_at_the_failure(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RESOLVENT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        bench.measure("x", lambda check: 1 / 0)


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_wrong_result_is_not_measured(bench: Bench, error: float):
    measured = []

    def ours(check: Callable[[float], None]) -> float:
        check(error)
        return measured.append(1) or 1.0

    outcome = bench.measure("x", ours, {"peer": lambda: 2.0}, tolerance=0.1)
    assert not measured and outcome.ours is None
    assert "WrongResultError: relative error" in outcome.failures["ours"]
    assert bench.measure("x", ours, tolerance=0.3).ours == (1.0 if error == error else None)


def test_every_operator_is_measured_beside_its_peers(bench: Bench, timed: list[str]):
    operators.measure_memory(bench, MEMORY)
    operators.measure_resolvent(bench, RESOLVENT)
    operators.measure_loss(bench, LOSS)
    assert [(row.unit, list(row.peers), row.failures) for row in bench.rows] == [
        ("ms", ["SDPA"], {}),
        ("ms", [], {}),
        ("ms", ["cross_entropy"], {}),
    ]
    assert all(row.error is not None and row.error < 1e-4 for row in bench.rows)


def wrong_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """A thousandth too much."""

    def run(*args: Any, **options: Any) -> Any:
        output = function(*args, **options)
        return (1.001 * output[0], *output[1:]) if isinstance(output, tuple) else 1.001 * output

    return run


def wrong_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The output is right, and a thousandth too little of the gradient comes through."""

    def run(*args: Any, **options: Any) -> Any:
        output = function(*args, **options)
        first = output[0] if isinstance(output, tuple) else output
        leaky = 0.999 * first + 0.001 * first.detach()
        return (leaky, *output[1:]) if isinstance(output, tuple) else leaky

    return run


@pytest.mark.parametrize("wrong", [wrong_output, wrong_gradient])
@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("dissipative_memory", lambda bench: operators.measure_memory(bench, MEMORY)),
        ("resolvent_diagonal", lambda bench: operators.measure_resolvent(bench, RESOLVENT)),
        ("linear_cross_entropy", lambda bench: operators.measure_loss(bench, LOSS)),
    ],
)
def test_a_wrong_operator_is_not_timed(bench: Bench, timed: list[str], monkeypatch, name: str, measure, wrong):
    monkeypatch.setattr(operators, name, wrong(getattr(operators, name)))
    measure(bench)
    (row,) = bench.rows
    assert row.ours is None
    assert row.failures["ours"].startswith("WrongResultError: relative error 1.0e-03")
    assert len(timed) == len(row.peers)


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_operator_is_noticed_without_gradients_too(monkeypatch: pytest.MonkeyPatch, backward: bool):
    memory = operators.MemoryCase(1, 70, 2, 16, backward=backward)
    chain = operators.ResolventCase(1, 70, 2, backward=backward)
    for name, error in (
        ("dissipative_memory", lambda: operators.memory_error(memory, CPU, torch.float32)),
        ("resolvent_diagonal", lambda: operators.resolvent_error(chain, CPU)),
    ):
        assert error() < 1e-5
        monkeypatch.setattr(operators, name, wrong_output(getattr(operators, name)))
        assert error() == pytest.approx(1e-3, rel=0.1)


def test_a_wrong_training_step_is_noticed():
    case = training.Case("tiny", 2, 70)
    model = training.new_model("tiny", CPU)
    right = training.Step(model, lambda ids, labels: model(ids, labels=labels), autocast=False)
    assert training.step_error(right, case, CPU) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())
    for factor, shift in ((1.01, 0.0), (0.99, 0.01)):

        def loss(ids: torch.Tensor, labels: torch.Tensor, factor: float = factor, shift: float = shift) -> torch.Tensor:
            exact = model(ids, labels=labels)
            return factor * exact + shift * exact.detach()

        wrong = training.Step(model, loss, autocast=False)
        assert training.step_error(wrong, case, CPU) == pytest.approx(0.01, rel=0.01)


def test_half_precision_passes_the_training_gate():
    case = training.Case("tiny", 1, 130)
    model = training.new_model("tiny", CPU)
    step = training.Step(model, lambda ids, labels: model(ids, labels=labels), autocast=True)
    assert 1e-3 < training.step_error(step, case, CPU) < 2.5e-2


def test_a_step_learns():
    case = training.Case("tiny", 1, 20)
    model = training.new_model("tiny", CPU)
    step = training.Step(model, lambda ids, labels: model(ids, labels=labels), autocast=False)
    tokens = training.batch(case, CPU)
    first = step.gradient(*tokens)
    for _ in range(20):
        step(*tokens)
    assert step.gradient(*tokens) < first


@pytest.fixture
def reader(bench: Bench) -> tuple[Any, Any, Any, torch.Tensor]:
    """Our model, the exact one, what the first has read, and a prompt."""
    preset = decoding.CASES["quick"][0].preset
    model = decoding._model(bench, preset)
    state = decoding.read(model, decoding._tokens(bench, preset, 100))[2]
    return model, decoding._exact_model(bench, preset), state, decoding._tokens(bench, preset, 1)


def test_generation_is_checked_against_the_likeliest_tokens(reader, monkeypatch: pytest.MonkeyPatch):
    model, exact, state, prompt = reader
    assert decoding.regret(model, exact, state, prompt) < 1e-4
    stream = model.stream
    monkeypatch.setattr(model, "stream", lambda ids, count, state, **options: stream(ids, count, **options))
    assert decoding.regret(model, exact, state, prompt) > 0.3  # it forgot what it had read
    monkeypatch.setattr(model, "stream", lambda ids, count, **_: iter(torch.randint(257, (count, 1))))
    assert decoding.regret(model, exact, state, prompt) > 3


def test_reading_in_pieces_is_checked(reader, monkeypatch: pytest.MonkeyPatch):
    model, exact, _, _ = reader
    ids = torch.randint(257, (1, 140))
    assert decoding.reading_error(model, exact, ids) < 1e-5
    read = model.read
    monkeypatch.setattr(model, "read", lambda ids, state: read(ids))
    assert decoding.reading_error(model, exact, ids) > 0.05


def test_reading_is_measured_in_tokens_per_second(reader, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: next(clock))
    speed, _, state = decoding.read(reader[0], torch.randint(257, (1, 60)))
    assert speed == 30
    assert state.position.tolist() == [60]


@pytest.mark.parametrize(("context", "contexts"), [(None, [20, 40]), (64, [64])])
def test_context_of_the_transformer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, context: int | None, contexts: list[int]
):
    case = decoding.Case("tiny", few=20, many=40, piece=50, context=context, generated=2)
    read: list[int] = []

    def speed(bench: Bench, case: decoding.Case, context: int, *options: object) -> float:
        read.append(context)
        return float(context)

    monkeypatch.setattr(decoding, "CASES", {"quick": [case]})
    monkeypatch.setattr(decoding, "CROWDS", {"quick": []})
    monkeypatch.setattr(decoding, "_CHECKED", 12)  # few tokens are checked: the test is of the contexts
    monkeypatch.setattr(decoding, "_transformer_speed", speed)
    measure_all(decoding, bench)
    assert read == contexts
    few, many = (row for row in bench.rows if row.peers)
    assert [few.peers["GPT"], many.peers["GPT"]] == [contexts[0], contexts[-1]]


def test_large_batches_are_measured_beside_the_transformer(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoding, "CASES", {"quick": []})
    measure_all(decoding, bench)
    speed, ratio = bench.rows
    assert speed.ours > 0 and speed.peers["GPT"] > 0 and not speed.failures
    assert ratio.ours == pytest.approx(speed.ours / speed.peers["GPT"])


def test_load_of_other_processes_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1e6, 0.0, 1e6, 0.0, 0.0])
    monkeypatch.setattr(harness, "cpu_seconds_of_others", lambda: next(clock))
    bench.measure("quick", lambda check: 1.0)  # its figures mean nothing
    bench.scale = "cpu"
    bench.measure("busy", lambda check: 1.0)
    bench.measure("idle", lambda check: 1.0)
    told = bench.console.file.getvalue()
    assert "busy: other processes used" in told
    assert "idle: other processes used" not in told and "quick: other processes used" not in told


def test_a_step_is_checked_on_a_shorter_sequence_on_the_cpu():
    case = training.Case("base", 1, 4096)
    assert training._shortened(case, CPU).length == 1024
    assert training._shortened(training.Case("tiny", 1, 100), CPU).length == 100


def test_the_transformer_with_our_parts_attends_everywhere_and_is_as_large():
    peer, ours = training.new_transformer("tiny", CPU, "GPT with our parts"), training.new_model("tiny", CPU)
    assert all(block.attention is not None and block.dissipative_bk is None for block in peer.blocks)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (peer, ours)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_a_process_of_its_own_ends_with_an_interruption():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.ProcessPoolExecutor, "submit", interrupted_after(memory.ProcessPoolExecutor.submit))
        started = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            memory.in_fresh_process(time.sleep, 600)
    assert time.perf_counter() - started < 60


def interrupted_after(submit: Callable[..., Any]) -> Callable[..., Any]:
    """Submit a function, then raise KeyboardInterrupt."""

    def run(*arguments: Any) -> Any:
        submit(*arguments)
        raise KeyboardInterrupt

    return run
