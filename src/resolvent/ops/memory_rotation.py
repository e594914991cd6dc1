"""Rotation of queries and keys by accumulated phases: the imaginary part of a memory's decay.

``dS/dt = η k vᵀ - (Γ + iΩ) S`` turns every pair of key channels, j and j + K/2, by an angle per token. A rotation
commutes with a decay that all channels share, so that queries and keys are rotated in the place of the memory, by the
sum Φ of all angles so far: ``R(Φ_t) q_t`` meets ``R(Φ_s) k_s`` at the angle ``Φ_s - Φ_t``.

Phases are counted in turns, in float64, and reduced to one turn at every chunk: nothing forgets the error of a phase.

Shapes: B batch, N sequence, H heads, K key width, P = K / 2 pairs, S packed sequences, M chunks, C tokens of a chunk.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .memory_state import CHUNK
from .packed import sequence_numbers
from .precision import wide_dtype
from .prefix_sum import prefix_sum

_SNAP = 0.02
"""Distance from a level, in levels, within which the turns of a stair are exactly that level."""


def plateau_turns(projected: Tensor) -> Tensor:
    """Return turns per unit time: ``sign(p) clamp(|p| - 1/4, 0, 1/2)`` of projections p.

    Exactly no turn up to a quarter, exactly half a turn from three quarters on, and linear between. A phase sums up the
    errors of all tokens, and training on short sequences leaves errors that longer ones show: on the two plateaus there
    are none, whatever the projection's own error is.

    Example:
        >>> plateau_turns(torch.tensor([-0.9, -0.5, 0.0, 0.2, 0.5, 0.8])).tolist()
        [-0.5, -0.25, 0.0, 0.0, 0.25, 0.5]
    """
    return F.softshrink(projected, 0.25).clamp(-0.5, 0.5)


def stair_turns(projected: Tensor, order: int) -> Tensor:
    """Return turns per unit time with plateaus at all multiples of 1 / ``order`` of a turn: float64, for projections p.

    With ``u = order p / 2``, ``f(u) = u - sin(2πu) / 2π`` is flat at every whole number, and f(f(u)) is within 1/50 of
    a whole number j for u within 0.29 of j. There the turns are exactly ``j / order``. Elsewhere they have a slope, so
    that training moves p from one plateau to the next; there is no last plateau.

    Example:
        >>> stair_turns(torch.tensor([-0.7, 0.05, 0.6, 1.3]), 3).mul(3).tolist()
        [-1.0, 0.0, 1.0, 2.0]
    """
    levels = projected.to(torch.float64) * (order / 2)  # the slope, up to 4, would enlarge float32's errors
    for _ in range(2):
        levels = levels - torch.sin(levels * (2 * math.pi)) / (2 * math.pi)
    nearest = levels.detach().round()
    levels = nearest + F.softshrink(levels - nearest, _SNAP) / (1 - 2 * _SNAP)
    return levels / order


def turns_by_order(projected: Tensor, orders: Sequence[int]) -> Tensor:
    """Return turns per unit time of equal groups of pairs: ``plateau_turns`` for order 2, ``stair_turns`` for others.

    Args:
        projected: projections, (..., P).
        orders: one order per group, from the first pairs to the last; their number divides P.

    Example:
        >>> turns_by_order(torch.full((4,), 0.8), (2, 3)).mul(6).tolist()
        [3.0, 3.0, 2.0, 2.0]
    """
    groups = projected.chunk(len(orders), dim=-1)
    turns = [
        plateau_turns(group) if order == 2 else stair_turns(group, order)
        for group, order in zip(groups, orders, strict=True)
    ]
    return torch.cat(turns, dim=-1) if len(turns) > 1 else turns[0]


def accumulate_phases(turns: Tensor, start: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum up the turns of the tokens.

    Args:
        turns: turns of every token, (B, N, P).
        start: phases before the first token, in turns, float64 (B, P) or (S, P).
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.

    Returns:
        The phases behind every token, float64 (B, N, P) in [0, 1], and those behind the last token of every sequence,
        like ``start``. Both are differentiable in ``turns`` and ``start``.

    Example:
        >>> turns, start = torch.rand(1, 70, 8) - 0.5, torch.zeros(1, 8, dtype=torch.float64)
        >>> phases, last = accumulate_phases(turns, start)
        >>> packed, _ = accumulate_phases(turns, start.repeat(2, 1), cu_seqlens=torch.tensor([0, 5, 70]))
        >>> torch.equal(last, phases[:, -1]), torch.allclose(packed[:, :5], phases[:, :5])
        (True, True)
    """
    sums_BNP = _sums_in_chunks(turns.to(torch.float64))
    if cu_seqlens is None:
        phases_BNP = _fraction(sums_BNP + start.unsqueeze(1))
        return phases_BNP, phases_BNP[:, -1] if turns.shape[1] else start
    offsets = cu_seqlens.to(turns.device, non_blocking=True)
    until_TP = F.pad(sums_BNP[0], (0, 0, 1, 0))
    before_SP = start - until_TP[offsets[:-1]]
    of_sequence_TP = before_SP[sequence_numbers(offsets, turns.shape[1])]
    return _fraction(sums_BNP + of_sequence_TP), _fraction(until_TP[offsets[1:]] + before_SP)


def _sums_in_chunks(turns_BNP: Tensor) -> Tensor:
    """Return the running sums, but for whole turns of the chunks before: a sum never grows beyond a chunk and M."""
    length = turns_BNP.shape[1]
    if length <= CHUNK:
        return prefix_sum(turns_BNP, dim=1)
    turns_BMCP = F.pad(turns_BNP, (0, 0, 0, -length % CHUNK)).unflatten(1, (-1, CHUNK))
    within_BMCP = prefix_sum(turns_BMCP, dim=2)
    totals_BMP = _fraction(within_BMCP[:, :, -1])
    before_BMP = prefix_sum(totals_BMP, dim=1) - totals_BMP
    return (within_BMCP + before_BMP.unsqueeze(2)).flatten(1, 2)[:, :length]


def _fraction(turns: Tensor) -> Tensor:
    return turns - turns.detach().floor()


def angles_of(phases: Tensor, dtype: torch.dtype) -> Tensor:
    """Return phases (turns, float64) as angles in [-π, π], reduced before ``dtype`` rounds them."""
    return ((phases - phases.detach().round()) * (2 * math.pi)).to(dtype)


class Rotation(NamedTuple):
    """Rotation of the pairs of channels of all heads, without gradients.

    Attributes:
        cos: cosines of both channels of the pairs, (B, N, 1, K).
        sin: sines, those of the first channels with the sign changed, (B, N, 1, K).
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def by(cls, turns: Tensor, dtype: torch.dtype) -> "Rotation":
        """Return the rotation by turns, float64 (B, N, P), for tensors of ``dtype``."""
        angles = angles_of(turns, dtype).unsqueeze(-2)
        sin = angles.sin()
        return cls(torch.cat([angles.cos()] * 2, -1), torch.cat([-sin, sin], -1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs of channels of all heads: x (B, N, H, K) in its dtype.

    Example:
        >>> x, turns = torch.randn(1, 70, 2, 16), torch.rand(1, 70, 8, dtype=torch.float64)
        >>> rotated = rotate(x, Rotation.by(turns, torch.float32))
        >>> rotated.shape, torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
        (torch.Size([1, 70, 2, 16]), True)
    """
    wide = x.to(rotation.cos.dtype)
    return torch.addcmul(wide * rotation.cos, wide.roll(x.shape[-1] // 2, -1), rotation.sin).to(x.dtype)


def rotate_queries_keys(q: Tensor, k: Tensor, phases: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs of channels of all heads: q, k (B, N, H, K) in their dtypes, phases in turns, float64 (B, N, P).

    Example:
        >>> q, k = torch.randn(2, 1, 70, 2, 16)
        >>> phases, _ = accumulate_phases(torch.rand(1, 70, 8), torch.zeros(1, 8, dtype=torch.float64))
        >>> rotated, _ = rotate_queries_keys(q, k, phases)
        >>> rotated.shape, torch.allclose(rotated.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
        (torch.Size([1, 70, 2, 16]), True)
    """
    angles = angles_of(phases, wide_dtype(q)).unsqueeze(-2)
    cos, sin = angles.detach().cos(), angles.detach().sin()
    return _Rotate.apply(q, angles, cos, sin), _Rotate.apply(k, angles, cos, sin)


class _Rotate(torch.autograd.Function):
    """Rotation by angles (..., 1, P), given with their cosines and sines, in at least float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, cos, sin)
        y = _rotated(x, cos, sin, -1)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # no second name for what is returned: see ops/__init__.py

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        x, cos, sin = ctx.saved_tensors
        # 1. Back to x: rotate the gradient back.
        grad_x = _rotated(grad, cos, -sin, -1)
        if x is None:
            return grad_x.to(grad.dtype), None, None, None
        # 2. To the angles: the derivative of a rotation is a quarter turn, which commutes with it.
        (first, second), (of_first, of_second) = x.to(grad_x.dtype).chunk(2, dim=-1), grad_x.chunk(2, dim=-1)
        grad_angles = (of_second * first - of_first * second).sum(-2, keepdim=True)
        return grad_x.to(x.dtype), grad_angles, None, None


def rotate_memory(memory: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs of rows of the memories of all heads: memory (B, H, K, V), angles (B, P) in radians."""
    turned = angles[:, None, :, None]
    return _rotated(memory, turned.cos(), turned.sin(), -2)


def quarter_turn_product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``<x, J y>`` of every pair over heads and values, J a quarter turn: (B, H, K, V) twice -> (B, P)."""
    (x_first, x_second), (y_first, y_second) = x.chunk(2, dim=-2), y.chunk(2, dim=-2)
    return (x_second * y_first - x_first * y_second).sum(dim=(1, 3))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=dim)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=dim)
