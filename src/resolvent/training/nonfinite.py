"""Losses, gradients and weights that are no numbers any more."""

import math

import torch
from torch import Tensor, nn

from resolvent.errors import ResolventError
from resolvent.training.sharding import whole_tensor


class NonFiniteError(ResolventError, ArithmeticError):
    """A loss, a gradient or a weight became infinite or NaN; what was saved before is whole.

    Args:
        step: the step, counted from one.
        name: the first tensor that is not finite.
        event: what happened.
        remedy: what to do about it.
    """

    def __init__(self, step: int, name: str, event: str, remedy: str) -> None:
        super().__init__(f"step {step}: {event}. {remedy}")
        self.step, self.name, self.event = step, name, event


def offending_gradient(model: nn.Module) -> str:
    """Name the gradient that the backward pass met first among those without a finite norm."""
    # Parameters are named in the order of the forward pass.
    gradients = [(name, x.grad) for name, x in model.named_parameters() if x.grad is not None]
    for name, gradient in reversed(gradients):
        if not _is_finite(torch.linalg.vector_norm(gradient)):
            return f"the gradient of {name}"
    return "the norm of all gradients together"


def offending_weight(model: nn.Module) -> str | None:
    """Name the first parameter that is not finite, None where all are."""
    # Zero times what is not finite is NaN. A process's share of a parameter may be empty.
    return next((name for name, x in model.named_parameters() if not _is_finite((0 * x.detach()).sum())), None)


def _is_finite(total: Tensor) -> bool:
    """Of a number that all processes compute together where the model is shared out between them."""
    return math.isfinite(whole_tensor(total).item())
