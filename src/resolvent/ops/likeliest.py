"""Likeliest token of every sequence, with its logit.

Shapes: B sequences, V vocabulary.
"""

import torch
from torch import Tensor

from .dispatch import count_run, select


def likeliest(logits: Tensor, token: Tensor | None = None, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the largest logit of every row: the index of the first of equal ones, and the logit.

    Args:
        logits: float (B, V).
        token: tensor that takes the indices, int64 (B,); None for a new one.
        total: tensor to which the logits are added, (B,); None for new zeros.

    Returns:
        ``token`` and ``total``. What is added to the total is not a number where a logit of the row is not.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, float("nan")]])
        >>> token, largest = likeliest(logits)
        >>> int(token[0]), largest
        (1, tensor([2., nan]))
    """
    if token is None:
        token = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if total is None:
        total = torch.zeros(len(logits), dtype=logits.dtype, device=logits.device)
    single = logits.dtype == total.dtype == torch.float32 and logits.stride(-1) == 1
    if select("auto", logits.device, "likeliest", None if single else "its kernel takes rows of float32") == "triton":
        from .triton.likeliest import likeliest as run

        run(logits, token, total)
        return token, total
    count_run("likeliest", "torch")
    largest, found = logits.max(-1)
    return token.copy_(found), total.add_(largest)
