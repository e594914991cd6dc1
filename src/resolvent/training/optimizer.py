"""Optimisers with weight decay on matrices only, and the optimiser state as named tensors."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resolvent.errors import CheckpointError
from resolvent.models import IntegratedModel
from resolvent.training.config import TrainingConfig
from resolvent.training.lora import is_adapter
from resolvent.training.muon import Muon

_NARROWEST = 64
"""Muon leaves matrices with a shorter side to AdamW: they have few singular values to make equal."""


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW with a switch on the device that skips steps.

    Attributes:
        found_inf: float32 (); while it is 1, steps change neither weights nor averages. PyTorch's fused kernels read
            it, without a synchronisation with the CPU.
    """

    found_inf: Tensor | None = None


def optimizer_of_run(config: TrainingConfig, model: IntegratedModel) -> GuardedAdamW | Muon:
    """Return the optimiser of a run, whose groups have their highest learning rates as ``initial_lr``, too."""
    shared = dict(
        learning_rate=config.peak_learning_rate(model.d_model),
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
    )
    if config.optimizer == "adamw":
        optimizer = build_optimizer(model, **shared)
    else:
        rate = config.peak_muon_learning_rate(model.d_model)
        processes = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        momentum = config.muon_momentum
        optimizer = build_muon(model, muon_learning_rate=rate, momentum=momentum, processes=processes, **shared)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rates of now as metrics: ``lr``, and ``muon_lr`` if Muon moves a matrix."""
    groups = optimizer.param_groups
    return {"muon_lr" if group.get("parts") else "lr": group["lr"] for group in groups}


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> GuardedAdamW:
    """Return AdamW with two parameter groups: matrices with weight decay, all other parameters without.

    Zero is no neutral value of biases, norms, decay rates, hoppings and energies, so that they do not decay.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    kept = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return GuardedAdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)


def build_muon(
    model: nn.Module,
    *,
    learning_rate: float,
    muon_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float = 0.95,
    processes: dist.ProcessGroup | None = None,
) -> Muon:
    """Return Muon for a model's matrices, with AdamW for embeddings, head, narrow matrices, vectors and scalars.

    Args:
        model: the model, whose head is ``lm_head``; its layers name the projections that lie on top of each other in a
            weight (``stacked``).
        learning_rate: of AdamW.
        muon_learning_rate: of Muon.
        weight_decay: of all parameters with two dimensions and more.
        betas: of AdamW.
        momentum: of Muon.
        processes: processes with the same model and gradients that share Muon's work; None for this one alone.
    """
    matrices = parts_of_matrices(model)
    others = [x for x in model.parameters() if x.requires_grad and x not in matrices]
    adamw = dict(lr=learning_rate, parts=None)
    groups: list[dict[str, Any]] = [
        dict(params=list(matrices), parts=list(matrices.values()), lr=muon_learning_rate, weight_decay=weight_decay),
        dict(params=[x for x in others if x.ndim >= 2], weight_decay=weight_decay, **adamw),
        dict(params=[x for x in others if x.ndim < 2], weight_decay=0.0, **adamw),
    ]
    return Muon([group for group in groups if group["params"]], betas=betas, momentum=momentum, processes=processes)


def parts_of_matrices(model: nn.Module) -> dict[Tensor, int]:
    """Return the trained matrices that Muon moves, and for each the projections that lie on top of each other in it.

    AdamW moves adapters, whatever their rank: one half of each is zero at the start, where no direction is orthogonal.
    """
    stacked, tables = dict[Tensor, int](), set[Tensor]([model.get_parameter("lm_head.weight")])
    for module in model.modules():
        for name, parts in getattr(module, "stacked", {}).items():
            if isinstance(layer := module.get_submodule(name), nn.Linear):
                stacked[layer.weight] = parts
        if isinstance(module, nn.Embedding):
            tables.add(module.weight)

    def is_wide(x: Tensor) -> bool:
        return min(x.shape[0] // stacked.get(x, 1), x.shape[1]) >= _NARROWEST

    named = model.named_parameters()
    trained = [x for name, x in named if x.requires_grad and x not in tables and not is_adapter(name)]
    return {x: stacked.get(x, 1) for x in trained if x.ndim == 2 and is_wide(x)}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser state under names such as `blocks.0.ffn.weight/exp_avg`, for safetensors."""
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of `optimizer_tensors`. A parameter that never had a gradient has none.

    Raises:
        CheckpointError: names the tensors that belong to no parameter of the model, or have another shape.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        by_parameter.setdefault(name, {})[key] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    if foreign := sorted(set(by_parameter) - set(order)):
        raise CheckpointError(f"the optimiser's state is of another model; this one lacks {', '.join(foreign)}")
    matrices = {names[p] for group in optimizer.param_groups if group.get("parts") for p in group["params"]}
    for name, state in by_parameter.items():
        shape = model.get_parameter(name).shape
        averages = dict(momentum_buffer=shape) if name in matrices else dict(step=(), exp_avg=shape, exp_avg_sq=shape)
        if {key: tensor.shape for key, tensor in state.items()} != averages:
            owner = "Muon" if name in matrices else "AdamW"
            raise CheckpointError(f"the optimiser's state of {name} is not {owner}'s, or of another shape")
    state = {index: by_parameter[name] for index, name in enumerate(order) if name in by_parameter}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
