"""Rotary positions: every pair of channels of a query or key turns with the position of its token (Su et al., 2021).

A pair is channel j and channel j + K/2. Positions are counted in turns, in float64, which ``rotate_queries_keys``
reduces to one turn before float32 sees them, so that a position of ten million is as exact as the first.

Shapes: K head width.
"""

import math

import torch
from torch import Tensor


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
