"""RMSNorm of the read-out of every head, its gate, and the features that enter the same product.

    normalized = x / rms(x) per head,        gated = normalized ⊙ sigmoid(opening + bias)

Shapes: B batch, N sequence, H heads, V value width, F features.
"""

import torch
from torch import Tensor

from .dispatch import beyond_float32, count_run, select
from .normalize import unit_rms


def gated_readout(
    readout: Tensor, opening: Tensor, bias: Tensor, features: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Normalise and gate the read-out of the heads, and put features beside it.

    Args:
        readout: read-out of the heads, any float (B, N, H, V).
        opening: logits of the gate, (B, N, HV), in the dtype of ``readout``.
        bias: added to the logits, (HV,).
        features: put behind the gated read-out, (B, N, F); None for none.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        The normalised read-out, (B, N, HV), and the gated one with the features behind it, (B, N, HV + F), in the dtype
        of ``readout``.

    Example:
        >>> readout, opening, features = torch.randn(1, 70, 2, 16), torch.randn(1, 70, 32), torch.randn(1, 70, 4)
        >>> normalized, gated = gated_readout(readout, opening, torch.zeros(32), features)  # tokens, packed or not
        >>> normalized.shape, gated.shape
        (torch.Size([1, 70, 32]), torch.Size([1, 70, 36]))
    """
    if features is None:
        features = readout.new_empty(*readout.shape[:2], 0)
    if select(backend, readout.device, "gated_readout", beyond_float32(readout.dtype)) == "triton":
        from .triton.gated_readout import gated_readout as run

        return run(readout, opening, bias, features)
    count_run("gated_readout", "torch")
    normalized = unit_rms(readout).flatten(-2)
    gated = normalized * torch.sigmoid(opening + bias.to(opening.dtype))
    return normalized, torch.cat([gated, features.to(gated.dtype)], dim=-1) if features.shape[-1] else gated
