"""Errors of operators."""

from torch import Tensor


def relative(x: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference."""
    return (x - reference).norm().item() / max(reference.norm().item(), 1e-300)
