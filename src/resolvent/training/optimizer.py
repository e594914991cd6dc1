"""AdamW with weight decay on matrices only, and the optimiser state as named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from resolvent.errors import CheckpointError


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW with a switch on the device that skips steps.

    Attributes:
        found_inf: float32 (); while it is 1, steps change neither weights nor averages. PyTorch's fused kernels read
            it, without a synchronisation with the CPU.
    """

    found_inf: Tensor | None = None


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
    for name, state in by_parameter.items():
        shape = model.get_parameter(name).shape
        if {key: tensor.shape for key, tensor in state.items()} != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
            raise CheckpointError(f"the optimiser's state of {name} is not AdamW's, or of another shape")
    state = {index: by_parameter[name] for index, name in enumerate(order) if name in by_parameter}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
