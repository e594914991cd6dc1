"""Rotary positions: every pair of channels of a query or key turns with the position of its token (Su et al., 2021).

A pair is channel j and channel j + K/2. Positions are counted in turns, in float64, which ``rotate_queries_keys``
reduces to one turn before float32 sees them, so that a position of ten million is as exact as the first.

Shapes: K head width.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

RotaryKind = Literal["linear", "dynamic", "llama3"]


class Scaling(NamedTuple):
    """Scaling of the rotary positions, which stretches a model to longer texts than it was trained on.

    Attributes:
        kind: ``linear``: all pairs turn ``factor`` times as slowly. ``dynamic``: beyond the original length, the base
            grows with the position of the token. ``llama3``: the slow pairs turn ``factor`` times as slowly, the fast
            ones as before, and those between them are interpolated.
        factor: factor of the length, >= 1.
        original_length: tokens of a training window before the scaling; ``dynamic`` and ``llama3`` read it.
        low_frequency, high_frequency: turns per original window below which a pair is slow, and above which it is
            fast; ``llama3`` reads them.
    """

    kind: RotaryKind
    factor: float
    original_length: int = 8192
    low_frequency: float = 1.0
    high_frequency: float = 4.0


def rotary_turns(position: Tensor, width: int, base: float = 10_000.0, scaling: Scaling | None = None) -> Tensor:
    """Return the turns of every pair of channels: integer positions (...) -> float64 (..., K / 2).

    Args:
        position: position of every token in its sequence.
        width: head width K, even.
        base: the slowest pair turns by about one radian in ``base`` tokens.
        scaling: scaling of the positions; None for none.

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
    places = position.to(torch.float64).unsqueeze(-1)
    if scaling is not None and scaling.kind == "dynamic":
        stretch = (scaling.factor * (places + 1) / scaling.original_length - (scaling.factor - 1)).clamp(min=1)
        # base -> base * stretch^(K / (K - 2)), without the base of a head of one pair, which does not turn on it
        exponent = -exponents * (width / max(width - 2, 1))
        return places * (base**-exponents * stretch**exponent / (2 * math.pi))
    turns = base**-exponents / (2 * math.pi)
    return places * (turns if scaling is None else _scaled(turns, scaling))


def _scaled(turns: Tensor, scaling: Scaling) -> Tensor:
    """Return the turns per token, (K / 2,), of ``linear`` and ``llama3``."""
    slow = turns / scaling.factor
    if scaling.kind == "linear":
        return slow
    low, high = scaling.low_frequency, scaling.high_frequency
    share = ((turns * scaling.original_length - low) / (high - low)).clamp(0, 1)
    return share * turns + (1 - share) * slow
