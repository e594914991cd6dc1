"""Several processes that read a sequence read it as one does."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from resolvent.models.base import Block
from resolvent.models.phase1 import Phase1Config, Phase1IntegratedModel
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel
from resolvent.ops import IGNORED
from resolvent.parallel import SequenceParallel
from tests.processes import together

LENGTH = 300
CUTS = {2: [137], 3: [128, 250]}
"""Starts of the stretches, by the number of processes."""
SMALL: dict[str, Any] = dict(vocab_size=31, d_model=16, n_layers=3, n_seq=64, num_heads=2, dropout=0.0)
MODELS = {
    "consolidated": Phase2Config(**SMALL, head_dim=8),
    "plain": Phase2Config(**SMALL, head_dim=8, snr_enabled=False, resonance_enabled=False, conv_size=1),
    "converted": Phase2Config(**SMALL, head_dim=8, ar_ssm_rank=4, zeta_embedding_trainable=True),
    "hybrid": Phase2Config(**SMALL, head_dim=8, attention_layers=(1,), attention_window=50),
    "phase 1": Phase1Config(**SMALL, ar_ssm_max_rank=4),
}


def make(
    config: Phase1Config | Phase2Config,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
    frozen: bool = False,
) -> Any:
    """A model in which nothing that starts at zero hides what depends on it; its beginning may be frozen."""
    torch.manual_seed(0)
    model = Phase1IntegratedModel(config) if isinstance(config, Phase1Config) else Phase2IntegratedModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    for block in cast(Iterable[Block], model.blocks):
        block.gradient_checkpointing = recompute
    if frozen:
        for part in (model.token_embedding, model.position_embedding, model.blocks[0]):
            part.requires_grad_(False)
    return model.train().to(dtype)


def text() -> tuple[Tensor, Tensor]:
    """Tokens and labels of two sequences; some labels do not count, among them all of the last stretch of three."""
    tokens = torch.randint(0, 31, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[:, 10:20] = labels[:, CUTS[3][-1] :] = IGNORED
    return tokens[:, :-1], labels


def piece(x: Tensor) -> Tensor:
    """This process's stretch, whose bounds are no multiples of anything."""
    return x.tensor_split(CUTS[dist.get_world_size()], dim=1)[dist.get_rank()]


def largest_differences(recompute: bool, frozen: bool) -> list[dict[str, float]]:
    """Return, for every model in float64, the largest differences of several processes' results to those of one alone.

    The results are loss, gradient, logits and last state.
    """
    dist.init_process_group("gloo")
    found = []
    for config in MODELS.values():
        alone = read_alone(make(config, torch.float64, recompute, frozen))
        shared = read_together(make(config, torch.float64, recompute, frozen))
        found.append({name: (x - alone[name]).abs().max().item() for name, x in shared.items()})
    return found


def errors_of_float32() -> list[dict[str, tuple[float, float]]]:
    """Return, for every model, how far several processes' results and those of one alone are from those of float64.

    Both are in float32; distances are root mean squares.
    """
    dist.init_process_group("gloo")
    found = []
    for config in MODELS.values():
        exact = read_alone(make(config, torch.float64))
        alone, shared = read_alone(make(config)), read_together(make(config))
        found.append({name: (rms(x - exact[name]), rms(alone[name] - exact[name])) for name, x in shared.items()})
    return found


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def read_alone(model: Any) -> dict[str, Tensor]:
    ids, labels = text()
    loss, state = model(ids, labels=labels, state=past(model), return_state=True)
    loss.backward()
    with torch.no_grad():
        return {"loss": loss, "logits": piece(model(ids)), "gradient": gradient(model), "state": flat(state.tensors())}


def read_together(model: Any) -> dict[str, Tensor]:
    ids, labels = map(piece, text())
    parallel = SequenceParallel(model)
    before = past(model) if dist.get_rank() == 0 else None
    loss, state = parallel(ids, labels=labels, state=before, return_state=True)
    loss.backward()
    parallel.sum_gradients()
    with torch.no_grad():
        found = {"loss": loss, "logits": parallel(ids), "gradient": gradient(model)}
    return found | ({"state": flat(state.tensors())} if dist.get_rank() == dist.get_world_size() - 1 else {})


def past(model: Any) -> Any:
    """The state after some text."""
    return model.hidden_states(text()[0][:, :70])[1].detach()


def gradient(model: Any) -> Tensor:
    return flat([p.grad for p in model.parameters() if p.requires_grad])


def flat(tensors: list[Tensor]) -> Tensor:
    real = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    return torch.cat([x.detach().flatten().double() for x in real])


@pytest.mark.parametrize(("processes", "recompute", "frozen"), [(2, False, False), (3, True, True)])
def test_stretches_equal_the_whole_sequence(processes: int, recompute: bool, frozen: bool):
    for found in together(processes, largest_differences, recompute, frozen):
        assert len(found) == len(MODELS)
        for name, distances in zip(MODELS, found, strict=True):
            for what, largest in distances.items():
                assert largest < 1e-12, (name, what)


def test_stretches_are_as_accurate_in_float32():
    """Several processes are no further from float64 than one, on the whole.

    Orders of additions differ, and read-outs that almost vanish are brought to unit size: at a few tokens two right
    results may be further from each other than is telling.
    """
    for found in together(2, errors_of_float32):
        assert len(found) == len(MODELS)
        for name, errors in zip(MODELS, found, strict=True):
            for what, (shared, alone) in errors.items():
                assert shared < 1e-5 and alone < 1e-5, (name, what, shared, alone)
                rounding = 1e-6 if what == "loss" else 0.0  # one number may be right by chance
                assert shared <= 3 * alone + rounding, (name, what, shared, alone)


def train_a_little(in_parallel: bool) -> list[float]:
    model = make(MODELS["consolidated"], torch.float64)
    ids, labels = text()
    reader = model
    if in_parallel:
        dist.init_process_group("gloo")
        reader = SequenceParallel(model)
        ids, labels = reader.stretch(ids), reader.stretch(labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = reader(ids, labels=labels)
        loss.backward()
        if isinstance(reader, SequenceParallel):
            reader.sum_gradients()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_in_stretches_equals_training():
    alone = train_a_little(False)
    assert alone[-1] < alone[0] - 0.02
    for losses in together(2, train_a_little, True):
        assert losses == pytest.approx(alone, rel=1e-10)


def refuse() -> None:
    dist.init_process_group("gloo")
    ids, labels = text()
    parallel = SequenceParallel(make(MODELS["plain"]))
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids, \(2, 150\), got \(2, 300\)"):
        parallel(parallel.stretch(ids), labels=labels)


def test_labels_of_another_stretch_are_refused():
    together(2, refuse)


def run_the_example() -> float:
    page = (Path(__file__).parents[1] / "docs" / "many_gpus.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], "many_gpus.md", "exec"), names)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    return names["loss"].item()


def test_the_example_of_the_page_runs():
    one, two = together(2, run_the_example)
    assert one == two
