"""Rotary positions: every pair of channels of a query or key turns with the position of its token (Su et al., 2021).

A pair is channel j and channel j + K/2. Positions are counted in turns, in float64, and reduced to one turn before
float32 sees them, so that a position of ten million is as exact as the first.

Shapes: B batch, N sequence, H heads, K head width.
"""

import math

import torch
from torch import Tensor

from .memory_rotation import Rotation, angles_of
from .precision import wide_dtype


def rotary_turns(position: Tensor, width: int, base: float = 10_000.0) -> Tensor:
    """Return the turns of every pair of channels: integer positions (...) -> float64 (..., K / 2).

    Args:
        position: position of every token in its sequence.
        width: head width K, even.
        base: the slowest pair turns by about one radian in ``base`` tokens.

    Raises:
        ValueError: the width is odd.

    Example:
        >>> turns = rotary_turns(torch.arange(70), width=16)
        >>> packed = rotary_turns(torch.tensor([0, 1, 2, 0, 1]), width=16)  # two sequences of 3 and 2 tokens
        >>> turns.shape, torch.equal(packed[3:], turns[:2])
        (torch.Size([70, 8]), True)
    """
    if width % 2:
        raise ValueError(f"rotary positions need an even head width, got {width}")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=position.device) / width
    return position.to(torch.float64).unsqueeze(-1) * (base**-exponents / (2 * math.pi))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the pairs of channels of every head: (B, N, H, K) -> (B, N, H, K) in the dtype of x.

    Args:
        x: queries or keys.
        turns: float64, broadcastable to (B, N, K / 2), without gradient.

    Example:
        >>> x = torch.randn(1, 70, 2, 16)  # tokens, packed or not
        >>> y = rotate(x, rotary_turns(torch.arange(70), width=16))
        >>> y.shape, torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
        (torch.Size([1, 70, 2, 16]), True)
    """
    # Only the reduction needs float64: on a GPU its sines and cosines take longer than a block.
    angles = angles_of(turns, wide_dtype(x)).unsqueeze(-2)
    return Rotation.apply(x, angles, angles.cos(), angles.sin())
