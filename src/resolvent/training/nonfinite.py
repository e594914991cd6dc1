"""Detection of losses, gradients and weights that are infinite or NaN."""

import math

import torch
from torch import Tensor, nn

from resolvent.errors import ResolventError
from resolvent.training.sharding import whole_tensor


class NonFiniteError(ResolventError, ArithmeticError):
    """Error of a loss, a gradient or a weight that is infinite or NaN; saved checkpoints are not affected.

    Args:
        step: the step, counted from one.
        name: the first tensor that is not finite.
        event: description of the event.
        remedy: advice to the user.
    """

    def __init__(self, step: int, name: str, event: str, remedy: str) -> None:
        super().__init__(f"step {step}: {event}. {remedy}")
        self.step, self.name, self.event = step, name, event


def offending_gradient(model: nn.Module) -> str:
    """Return the name of the gradient that the backward pass computed first among those without a finite norm."""
    # Parameters are named in the order of the forward pass.
    gradients = [(name, x.grad) for name, x in model.named_parameters() if x.grad is not None]
    for name, gradient in reversed(gradients):
        if not _is_finite(torch.linalg.vector_norm(gradient)):
            return f"the gradient of {name}"
    return "the norm of all gradients together"


def offending_weight(model: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite; None if all are finite."""
    # Zero times a value that is not finite is NaN. The shard of a process may be empty.
    return next((name for name, x in model.named_parameters() if not _is_finite((0 * x.detach()).sum())), None)


def _is_finite(total: Tensor) -> bool:
    """Return True for a finite number, which all processes compute together if the model is sharded."""
    return math.isfinite(whole_tensor(total).item())
