"""Inference by a model that others use at the same time: results and modes are those of a model used alone."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

from experiments.ablation.measures import evaluate_mechanisms
from resolvent.data import encode_documents
from resolvent.data.tokenization import bytes_tokenizer
from resolvent.errors import ConfigError
from resolvent.evaluation import (
    evaluate_documents,
    evaluate_needle,
    evaluate_positions,
    measure_influence,
)
from resolvent.inspection import inspect_model
from resolvent.models import IntegratedModel
from resolvent.models.inference import evaluating, inference_view
from resolvent.training.diagnostics import read_diagnostics

from .small import PHASE1, PHASE2, SmallPhase, tokens

THREADS = 10
TEXT = "The old cat sat on the mat, and the dog looked on. " * 30
PHASES = pytest.mark.parametrize("phase", [PHASE1, PHASE2], ids=["phase1", "phase2"])


def dropping(phase: SmallPhase, **options: object) -> IntegratedModel:
    """A model in training mode, with dropout; one block is frozen in evaluation mode."""
    torch.manual_seed(0)
    model = phase.model(dropout=0.4, **options).train()
    next(iter(model.blocks)).eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def sampled(model: IntegratedModel, seed: int) -> Iterator[Tensor]:
    prompt = torch.full((1, 9), seed)
    return model.stream(prompt, 7, generator=torch.Generator().manual_seed(seed))


@PHASES
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_ten_threads_equal_solo_runs(phase: SmallPhase, training: bool):
    model = dropping(phase).train(training)
    alone = [torch.stack(list(sampled(model, seed))) for seed in range(THREADS)]
    before, together = modes(model), Barrier(THREADS)

    def write(seed: int) -> list[Tensor]:
        together.wait()
        streams = [sampled(model, seed), sampled(model, (seed + 1) % THREADS)]  # two that take turns
        written: list[list[Tensor]] = [[], []]
        for pair in zip(*streams, strict=True):
            assert modes(model) == before
            for tokens_so_far, token in zip(written, pair, strict=True):
                tokens_so_far.append(token)
        return [torch.stack(parts) for parts in written]

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(write, range(THREADS)))
    for seed, (first, second) in enumerate(results):
        assert torch.equal(first, alone[seed])
        assert torch.equal(second, alone[(seed + 1) % THREADS])
    assert modes(model) == before


@PHASES
def test_open_stream_does_not_change_training(phase: SmallPhase):
    """The step has dropout, the stream has none, and what is abandoned leaves nothing behind."""
    model, ids = dropping(phase), tokens(20)
    expected = torch.stack(list(sampled(model, 3)))

    def loss() -> Tensor:
        torch.manual_seed(1)
        return model(ids[:, :-1], labels=ids[:, 1:])

    before, stream = loss(), sampled(model, 3)
    written = [next(stream)]
    assert torch.equal(loss(), before)
    model.eval()
    assert not torch.equal(loss(), before)
    written.append(next(stream))
    model.train()
    written += stream
    assert torch.equal(torch.stack(written), expected)


MEASURES = {
    "language": lambda model, stream, tokenizer: evaluate_documents(model, stream, tokenizer),
    "positions": lambda model, stream, tokenizer: evaluate_positions(model, stream, tokenizer, length=90),
    "needle": lambda model, stream, tokenizer: evaluate_needle(
        model, stream, tokenizer, length=16, samples=2, candidates=3
    ),
    "influence": lambda model, stream, tokenizer: measure_influence(model, stream, length=40, sequences=1),
    "mechanisms": lambda model, stream, tokenizer: evaluate_mechanisms(model, stream, tokenizer, length=64, horizon=2),
    "inspection": lambda model, stream, tokenizer: inspect_model(model, tokenizer, TEXT, length=40),
    "diagnostics": lambda model, stream, tokenizer: (
        read_diagnostics(model, torch.from_numpy(stream.tokens[:40].astype("int64"))).scalars
    ),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_leave_the_model_unchanged(measure: str):
    """Beside a thread that watches: no mode, hook or flag of the model changes while it is measured."""
    model = dropping(PHASE2, vocab_size=257)
    tokenizer = bytes_tokenizer()
    stream = encode_documents([TEXT], tokenizer)
    before, seen, busy = facts(model), [], True

    def watch() -> None:
        while busy:
            seen.append(facts(model) == before)
            time.sleep(0.001)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            found = MEASURES[measure](model, stream, tokenizer)
        finally:
            busy = False
        watching.result()
    assert all(seen) and facts(model) == before
    assert found == MEASURES[measure](model.eval(), stream, tokenizer)
    if measure != "diagnostics":  # results are shown as one line
        assert (
            repr(found).startswith(type(found).__name__) and len(repr(found).splitlines()[0]) == len(repr(found)) < 150
        )


def facts(model: nn.Module) -> list[object]:
    """Return everything that a measure might change in a model."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    parts = [getattr(block, "snr_filter", None) for block in model.blocks]
    return [modes(model), hooks, trained, parts]


def test_view_shares_weights_only():
    model = dropping(PHASE2, tie_embeddings=True)
    calls: list[nn.Module] = []
    model.ln_f.register_forward_hook(lambda module, *_: calls.append(module))
    view = inference_view(model)
    assert type(view) is type(model) and view.tied
    for (name, parameter), (same, shared) in zip(model.named_parameters(), view.named_parameters(), strict=True):
        assert name == same and parameter is shared
    assert not {*map(id, model.modules())} & {*map(id, view.modules())}
    ids = tokens(10)
    assert torch.equal(view(ids), inference_view(model)(ids))
    assert len(calls) == 2  # hooks act in views, too
    view.ln_f.register_forward_hook(lambda *_: pytest.fail("a hook of the view acts in the model"))
    view.lm_head, view.blocks[0].snr_filter = nn.Identity(), None
    model(ids)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.zero_()
    assert not inference_view(model)(ids).any()


def test_view_without_parameter_gradients():
    model = dropping(PHASE2, tie_embeddings=True)
    view = inference_view(model, parameter_gradients=False)
    assert view.tied and not any(parameter.requires_grad for parameter in view.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert view.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("wrap", ["compiled model", "compiled block", "replaced forward"])
def test_model_without_view_needs_evaluation_mode(wrap: str):
    model = dropping(PHASE2)
    block = next(iter(model.blocks))
    if wrap == "compiled block":
        block.compile(backend="eager")
    if wrap == "replaced forward":
        block.forward = block.forward
    whole = torch.compile(model, backend="eager") if wrap == "compiled model" else model
    with pytest.raises(ConfigError, match=r"call eval\(\) on the model"):
        inference_view(whole)
    assert inference_view(whole.eval()) is whole


def test_evaluating_restores_the_mode_of_every_module():
    model = dropping(PHASE2)
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before and len(set(before)) == 2
