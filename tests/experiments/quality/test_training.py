import math
import time

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from experiments.quality.models import Size, build
from experiments.quality.training import Clock, Mode, OutOfTimeError, Schedule, Trainer

SCHEDULE = Schedule(steps=8, warmup=2, final=0.1)
PLAIN = Mode(compiled=False, captured=False, autocast=False)
FOREVER = Clock(math.inf)


def prepared(
    name: str = "phase2",
    mode: Mode = PLAIN,
    device: str = "cpu",
    dropout: float = 0.1,
    dtype: torch.dtype = torch.float32,
    muon_ratio: float | None = None,
):
    size = Size(31, 128, 1, 200_000, 32, dropout)
    entry = build(name, size, device)
    entry.model.to(dtype)
    entry.reset(0)
    ids = torch.randint(31, (8, 2, 33), generator=torch.Generator().manual_seed(0)).to(device)

    def loss(step: torch.Tensor) -> torch.Tensor:
        batch = ids.index_select(0, step)[0]
        return entry.model(batch[:, :-1].contiguous(), labels=batch[:, 1:].contiguous())

    shape = dict(muon_ratio=muon_ratio, rate_factors=entry.rate_factors)
    return entry, Trainer(entry.model, [loss], SCHEDULE.steps, mode, **shape), ids


def trained(entry, trainer, seed: int = 5, peak: float = 1e-2, steps: int = 8) -> list[float]:
    entry.reset(seed)
    torch.manual_seed(seed)
    trainer.start(SCHEDULE.rates(peak))
    assert trainer.advance([0] * steps, FOREVER)
    return trainer.losses()


def test_steps_are_those_of_a_plain_loop():
    # In float64: Adam makes whole steps of the rounding errors of gradients near zero.
    entry, trainer, ids = prepared(dtype=torch.float64)
    found = trained(entry, trainer)

    other, _, _ = prepared(dtype=torch.float64)
    other.reset(5)
    torch.manual_seed(5)
    model = other.model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False)
    expected = []
    for step in range(8):
        warm = (step + 1) / 2 if step < 2 else None
        factor = warm or 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / 6)) / 2
        loss = model(ids[step, :, :-1], labels=ids[step, :, 1:])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-2 * factor).item()  # the trainer's rates are float32
        optimizer.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, rel=1e-6)
    for a, b in zip(entry.model.parameters(), model.parameters(), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("muon_ratio", [None, 5.0])
def test_runs_are_independent(muon_ratio: float | None):
    entry, trainer, _ = prepared(muon_ratio=muon_ratio)
    first = trained(entry, trainer)
    assert trained(entry, trainer, seed=6) != first
    assert trainer.seconds([0] * 8) > 0
    assert trained(entry, trainer) == first
    fresh_entry, fresh_trainer, _ = prepared(muon_ratio=muon_ratio)
    assert trained(fresh_entry, fresh_trainer) == first


def test_muon_takes_a_multiple_of_the_learning_rate():
    entry, trainer, _ = prepared(muon_ratio=5.0)
    losses = trained(entry, trainer, peak=1e-3)
    matrices, *others = trainer.optimizer.param_groups
    assert matrices["parts"] and len(others) == 2
    assert [group["lr"].item() for group in others] == pytest.approx([1e-4, 1e-4])
    assert matrices["lr"].item() == pytest.approx(5e-4)
    assert losses != trained(*prepared()[:2], peak=1e-3)


@pytest.mark.parametrize("muon_ratio", [None, 5.0], ids=["adamw", "muon"])
def test_parameters_may_take_a_multiple_of_the_learning_rate(muon_ratio: float | None):
    entry, trainer, _ = prepared("phase2/gamma-rate-10", muon_ratio=muon_ratio)
    losses = trained(entry, trainer, peak=1e-3)
    *others, ours = trainer.optimizer.param_groups
    assert [p is entry.model.blocks[0].dissipative_bk.potential.gamma_bias for p in ours["params"]] == [True]
    assert ours["lr"].item() == pytest.approx(1e-3) and others[-1]["lr"].item() == pytest.approx(1e-4)
    assert ours["weight_decay"] == 0.0
    assert losses != trained(*prepared(muon_ratio=muon_ratio)[:2], peak=1e-3)


def test_no_learning_rate_of_what_adamw_does_not_move_is_multiplied():
    model = prepared()[0].model
    with pytest.raises(ValueError, match=r"Muon moves out_proj\.weight"):
        Trainer(model, [model], 8, PLAIN, muon_ratio=5.0, rate_factors={"out_proj.weight": 10.0})
    with pytest.raises(ValueError, match="no trained parameter's name ends with nothing"):
        Trainer(model, [model], 8, PLAIN, rate_factors={"nothing": 10.0})


def test_it_learns_and_reports_the_losses_of_the_steps_taken():
    entry, trainer, _ = prepared()
    losses = trained(entry, trainer, steps=3)
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(31), abs=0.3)


def test_nonfinite_loss_is_detected():
    entry, trainer, _ = prepared()
    entry.reset(0)
    trainer.start(SCHEDULE.rates(1e-2))
    with torch.no_grad():
        entry.model.token_embedding.weight[0, 0] = torch.nan
    assert not trainer.advance([0] * 8, FOREVER)


def test_the_clock_ends_a_run():
    entry, trainer, _ = prepared()
    entry.reset(0)
    trainer.start(SCHEDULE.rates(1e-2))
    with pytest.raises(OutOfTimeError):
        trainer.advance([0] * 8, Clock(time.monotonic() - 1))
    with pytest.raises(OutOfTimeError):
        Clock.of(5).check(10)
    Clock.of(20).check(10)


@pytest.mark.parametrize("name", ["gla", "phase2"])
def test_compiled_blocks_equal_eager_ones(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_aot_eager)
    entry, trainer, _ = prepared(name, Mode(compiled=True, captured=False, autocast=False), dropout=0.0)
    assert trainer.compiled_error <= 1e-4
    plain = trained(*prepared(name, dropout=0.0)[:2])
    assert trained(entry, trainer) == pytest.approx(plain, rel=1e-4)
    torch._dynamo.reset()


def compile_with_aot_eager(module: torch.nn.Module, **options) -> None:
    module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager", **options)


def test_a_wrong_compiled_gradient_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def negate(module: torch.nn.Module, **_) -> None:
        module._compiled_call_impl = lambda x, *rest: module._call_impl(-x, *rest)

    monkeypatch.setattr(torch.nn.Module, "compile", negate)
    with pytest.raises(ArithmeticError, match="the compiled gradient is off by"):
        prepared("transformer", Mode(compiled=True, captured=False, autocast=False), dropout=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("name", "muon_ratio"),
    [
        *((name, None) for name in ("transformer", "gla", "mamba2", "gated-deltanet", "phase2")),
        ("phase2", 5.0),
        ("phase2/attention/no-qk-norm", 5.0),
    ],
)
def test_captured_run_equals_an_eager_one(name: str, compiled: bool, muon_ratio: float | None):
    runs = []
    for captured in (False, True):
        torch.compiler.reset()
        mode = Mode(compiled=compiled, captured=captured, autocast=True)
        entry, trainer, _ = prepared(name, mode, "cuda", dropout=0.0, muon_ratio=muon_ratio)
        runs.append([trained(entry, trainer), trained(entry, trainer, peak=1e-3)])
        assert runs[-1][0] != runs[-1][1]
    assert runs[1][0] == pytest.approx(runs[0][0], rel=2e-3)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=2e-3)
