"""Muon: what a step is, and that it is the same however it is computed."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from resolvent.models.phase1 import Phase1Config, Phase1IntegratedModel
from resolvent.models.phase2 import Phase2IntegratedModel, create_phase2_model
from resolvent.training import muon as muon_module
from resolvent.training.muon import Muon, orthogonalize
from resolvent.training.optimizer import build_muon, parts_of_matrices
from tests.processes import together

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [((192, 64), 3), ((192, 64), 3), ((64, 64), 1), ((256, 64), 2), ((64, 128), 1)]
"""Matrices and the projections in each: of one shape and of several, square, wide and tall."""
RATE, DECAY, MOMENTUM = 0.02, 0.1, 0.9


def matrices(device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape, _ in SHAPES]


def gradients(step: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(device) * 10.0 ** (step - 3) for shape, _ in SHAPES]


def muon(parameters: list[Any], rate: float | Tensor = RATE, **settings: Any) -> Muon:
    group = dict(params=parameters, parts=[parts for _, parts in SHAPES], lr=rate, weight_decay=DECAY)
    return Muon([group], momentum=MOMENTUM, **settings)


def take_steps(parameters: list[Any], steps: int, device: str = "cpu", **settings: Any) -> list[Any]:
    optimizer = muon(parameters, **settings)
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step, device), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return parameters


def quintic(x: Tensor) -> Tensor:
    """The five steps for a single matrix, in float64, as the paper has them."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def reference(steps: int) -> list[Tensor]:
    """Steps of Muon in float64, one projection after the other."""
    weights = [x.detach().double() for x in matrices()]
    buffers = [torch.zeros_like(x) for x in weights]
    for step in range(steps):
        for weight, buffer, gradient, (_, parts) in zip(weights, buffers, gradients(step), SHAPES, strict=True):
            buffer.mul_(MOMENTUM).add_(gradient)
            weight *= 1 - RATE * DECAY
            for rows, ahead in zip(weight.chunk(parts), (gradient + MOMENTUM * buffer).chunk(parts), strict=True):
                rows -= RATE * math.sqrt(max(1.0, rows.shape[0] / rows.shape[1])) * quintic(ahead)
    return weights


@pytest.mark.parametrize("device", DEVICES)
def test_steps_equal_those_of_single_matrices_in_float64(device: str):
    """Up to rounding in float32; of bfloat16 products on CUDA, a hundredth of a step."""
    found = take_steps(matrices(device), 3, device)
    for ours, theirs, start in zip(found, reference(3), matrices(), strict=True):
        error = (ours.cpu().double() - theirs).norm() / (theirs - start.double()).norm()
        assert error < (1e-5 if device == "cpu" else 5e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)])
def test_directions_are_the_polar_factor_up_to_the_five_steps(device: str, shape: tuple[int, int]):
    """Singular vectors are those of the matrix; its large singular values become 0.68 to 1.21."""
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64))
    matrix = (left * torch.linspace(0.1, 1.0, min(shape), dtype=torch.float64)) @ right.T
    (found,) = orthogonalize([matrix[None].float().to(device)])
    inside = left.T @ found[0].cpu().double() @ right
    limit = 1e-5 if device == "cpu" else 3e-2
    assert (inside - inside.diagonal().diag()).norm() / inside.norm() < limit
    assert (found[0].cpu().double() - left @ inside @ right.T).norm() / inside.norm() < limit
    assert inside.diagonal().min() > 0.66 and inside.diagonal().max() < 1.23
    cosine = (found[0].cpu().double() * (left @ right.T)).sum() / found.cpu().double().norm() / math.sqrt(min(shape))
    assert cosine > 0.97


@pytest.mark.parametrize("device", DEVICES)
def test_batches_equal_single_matrices(device: str):
    batches = [torch.randn(3, 64, 96), torch.randn(1, 96, 64), torch.randn(2, 64, 96), torch.randn(1, 80, 80)]
    together = orthogonalize([x.to(device) for x in batches])
    for batch, found in zip(batches, together, strict=True):
        assert found.shape == batch.shape
        for matrix, ours in zip(batch, found, strict=True):
            (alone,) = orthogonalize([matrix[None].to(device)])
            torch.testing.assert_close(ours, alone[0], rtol=0, atol=1e-5 if device == "cpu" else 2e-2)


def test_size_of_the_gradient_does_not_matter():
    x = torch.randn(1, 64, 96)
    (expected,) = orthogonalize([x])
    for scale in (1e-15, 1e-5, 1e12):
        torch.testing.assert_close(orthogonalize([x * scale])[0], expected, rtol=1e-3, atol=1e-5)
    assert not orthogonalize([x * 0.0])[0].any()
    assert orthogonalize([]) == []


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_changes_nothing_while_the_switch_is_on(device: str):
    def after(*switches: bool | None) -> list[Tensor]:
        """Weights and momentum after a step for every switch; gradients are NaN where it is on."""
        parameters = matrices(device)
        optimizer = muon(parameters)
        for on in switches:
            optimizer.found_inf = None if on is None else torch.tensor(float(on), device=device)
            for parameter, gradient in zip(parameters, gradients(0, device), strict=True):
                parameter.grad = gradient * (math.nan if on else 1.0)
            optimizer.step()
        return [*parameters, *(optimizer.state[p]["momentum_buffer"] for p in parameters)]

    for found, expected in zip(after(True, False, True, True, False), after(None, None), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_scaler_skips_what_is_not_finite_and_undoes_its_factor(device: str):
    parameters, scaler = matrices(device), torch.amp.GradScaler(device, init_scale=1024.0)
    optimizer = muon(parameters)
    for step, spoilt in enumerate([False, True, False]):
        before = [x.detach().clone() for x in parameters]
        optimizer.zero_grad()
        terms = [(p * g).sum() for p, g in zip(parameters, gradients(min(step, 1), device), strict=True)]
        scaler.scale(sum(terms) * (math.inf if spoilt else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        for after, weight in zip(parameters, before, strict=True):
            assert torch.equal(after, weight) == spoilt
    expected = take_steps(matrices(device), 2, device)
    for ours, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if device == "cpu" else 1e-2)


# --- which parameters ------------------------------------------------------------------------------------------------


def new_model(**changes: Any) -> Phase2IntegratedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, d_model=128, n_layers=2, n_seq=64, num_heads=2, head_dim=64, dropout=0.0)
    return create_phase2_model(**(sizes | changes), device=torch.device("cpu"))


def names_of(model: nn.Module) -> dict[str, int]:
    names = {x: name for name, x in model.named_parameters()}
    return {names[x]: parts for x, parts in parts_of_matrices(model).items()}


def test_muon_moves_the_wide_matrices_of_the_blocks():
    block = {
        "hebbian.qkv_proj": 3, "hebbian.out_proj": 1, "hebbian.gate_down": 1, "hebbian.gate_up": 1,
        "ffn.in_proj": 2, "ffn.out_proj": 1,
    }  # fmt: skip
    expected = {f"blocks.{i}.{name}.weight": parts for i in range(2) for name, parts in block.items()}
    assert names_of(new_model()) == expected
    attends = names_of(new_model(attention_layers=(1,)))
    assert attends["blocks.1.attention.qkv_proj.weight"] == 3
    narrow = names_of(new_model(head_dim=32))
    assert "blocks.0.hebbian.gate_up.weight" not in narrow
    assert narrow["blocks.0.hebbian.qkv_proj.weight"] == 3, "three projections of 64 rows"
    assert "blocks.0.hebbian.qkv_proj.weight" not in names_of(new_model(num_heads=1, head_dim=32))


def test_every_trained_parameter_is_in_one_group_and_matrices_decay():
    model = new_model()
    model.get_parameter("blocks.0.ffn.in_proj.weight").requires_grad_(False)
    model.get_parameter("ln_f.weight").requires_grad_(False)
    rates = dict(learning_rate=1.0, muon_learning_rate=2.0)
    groups = build_muon(model, **rates, weight_decay=0.1, betas=(0.8, 0.9), momentum=0.7).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(2.0, 0.1), (1.0, 0.1), (1.0, 0.0)]
    assert groups[0]["momentum"] == 0.7 and groups[1]["betas"] == (0.8, 0.9)
    names = {x: name for name, x in model.named_parameters()}
    found = [[names[x] for x in group["params"]] for group in groups]
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert sorted(name for names in found for name in names) == sorted(trained)
    assert {"token_embedding.weight", "lm_head.weight", "blocks.0.bk_proj.weight"} <= set(found[1])
    assert all(model.get_parameter(name).ndim < 2 for name in found[2])


def test_projections_of_low_rank_are_matrices_of_their_own():
    sizes = dict(vocab_size=257, d_model=128, n_layers=1, n_seq=64, num_heads=2, ar_ssm_max_rank=80, htt_rank=5)
    found = names_of(Phase1IntegratedModel(Phase1Config(**sizes)))
    assert "lm_head.weight" not in found
    assert not [name for name in found if name.startswith("token_embedding")]
    assert found["blocks.0.ar_ssm.u_proj.weight"] == 1


# --- processes and graphs --------------------------------------------------------------------------------------------


def compare_shards(steps: int) -> list[bool]:
    """Return True for matrices, then momenta, that are equal in one process and in several that share their rows."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def share(x: Tensor) -> DTensor:
        return distribute_tensor(x.detach(), mesh, [Shard(0)])

    alone, shared = matrices(), [nn.Parameter(share(x)) for x in matrices()]
    optimizers = [muon(alone), muon(shared)]
    for step in range(steps):
        for mine, ours, gradient in zip(alone, shared, gradients(step), strict=True):
            mine.grad, ours.grad = gradient, share(gradient)
        for optimizer in optimizers:
            optimizer.step()
    buffers = [[optimizer.state[x]["momentum_buffer"] for x in optimizer.state] for optimizer in optimizers]
    pairs = zip(alone + buffers[0], shared + buffers[1], strict=True)
    return [torch.equal(mine, ours.full_tensor()) for mine, ours in pairs]


@pytest.mark.parametrize("processes", [2, 3])
def test_shards_move_as_whole_matrices(processes: int):
    """Bit for bit; also where rows cannot be shared evenly, or a projection ends within a share."""
    assert together(processes, compare_shards, 3) == [[True] * 2 * len(SHAPES)] * processes


def count_shares(steps: int) -> tuple[list[bool], list[int]]:
    """Return True for matrices equal to those of a process alone, and the projections orthogonalised in each step."""
    dist.init_process_group("gloo")
    counts, newton_schulz = [], muon_module._newton_schulz
    muon_module._newton_schulz = lambda batches: (counts.append(sum(map(len, batches))), newton_schulz(batches))[1]
    shared = take_steps(matrices(), steps, processes=dist.group.WORLD)
    counted = list(counts)
    return [torch.equal(mine, ours) for mine, ours in zip(take_steps(matrices(), steps), shared, strict=True)], counted


def test_processes_with_equal_gradients_share_the_work():
    """Each orthogonalises some of the matrices, and all end with the same, bit for bit."""
    results = together(2, count_shares, 2)
    assert [equal for equal, _ in results] == [[True] * len(SHAPES)] * 2
    projections = sum(parts for _, parts in SHAPES)
    assert sum(sum(counts) for _, counts in results) == 2 * projections
    assert all(0.25 * projections < sum(counts) / 2 < 0.75 * projections for _, counts in results)


@pytest.mark.gpu
def test_a_recorded_step_equals_an_eager_one():
    """With learning rates that change between replays, and memory that is used for other things in between."""
    device = torch.device("cuda")
    eager, recorded = matrices("cuda"), matrices("cuda")
    rate = torch.zeros((), device=device)
    static = [torch.zeros_like(x) for x in recorded]
    optimizers = [muon(eager), muon(recorded, rate)]
    for parameter, gradient in zip(recorded, static, strict=True):
        parameter.grad = gradient
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="take a step before recording"), torch.cuda.graph(graph):
        optimizers[1].step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizers[1].step()  # of rate 0, without a gradient
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizers[1].step()
    for step in range(6):
        for group in optimizers[0].param_groups:
            group["lr"] = RATE / (step + 1)
        rate.fill_(RATE / (step + 1))
        for parameter, source, gradient in zip(eager, static, gradients(step % 3, "cuda"), strict=True):
            parameter.grad = gradient
            source.copy_(gradient)
        optimizers[0].step()
        torch.empty(2**24, device=device).fill_(math.nan)
        graph.replay()
    for ours, theirs in zip(recorded, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
