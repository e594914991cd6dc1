"""The recurrences of the peers in chunked form, as plain torch code, in at least float32.

Shapes: B batch, N sequence, H heads, K key width, V value width, M chunks, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resolvent.ops.precision import at_least_float32

CHUNK = 64
_TINY = 8
"""Largest matrices that are multiplied elementwise."""


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """``S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ``, ``y_t = S_tᵀ q_t``: a decay for every channel of the keys.

    Inside a chunk the decays are split at its middle token, which is exact as long as half a chunk's decays sum to less
    than 80 in each channel.

    Args:
        q: (B, N, H, K).
        k: (B, N, H, K).
        v: (B, N, H, V).
        log_decay: g <= 0, (B, N, H, K).

    Returns:
        y (B, N, H, V) in the dtype of v.
    """
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_, g = (_to_chunks(x) for x in (q, k, v, log_decay))
        g = g.cumsum(-2)
        middle, end = g[..., CHUNK // 2 - 1 : CHUNK // 2, :], g[..., -1:, :]
        scores = ((q_ * (g - middle).exp()) @ (k_ * (middle - g).exp()).mT).tril()
        written = (k_ * (end - g).exp()).mT @ v_
        before = _carry(written, end.mT.exp())
        y = scores @ v_ + (q_ * g.exp()) @ before
        return _from_chunks(y, v)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """``S_t = exp(g_t) (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ``, ``y_t = S_tᵀ q_t``: what a key held is replaced.

    A chunk's corrections ``u_t = β_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)`` solve a unit lower triangular system, the
    WY form. They are affine in the state before the chunk, and so is the state behind it: only ``S <- A S + B`` remains
    to be computed chunk after chunk.

    Args:
        q: (B, N, H, K).
        k: (B, N, H, K), L2-normalised.
        v: (B, N, H, V).
        log_decay: g <= 0, (B, N, H).
        beta: β in [0, 1], (B, N, H).

    Returns:
        y (B, N, H, V) in the dtype of v.
    """
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_ = (_to_chunks(x) for x in (q, k, v))
        g, b = (_to_chunks(x.unsqueeze(-1)) for x in (log_decay, beta))
        g = g.cumsum(-2)
        between = (g - g.mT).tril().exp().tril()
        inverse = UnitLowerInverse.apply((b * between * (k_ @ k_.mT)).tril(-1))
        new, old = inverse @ (b * v_), inverse @ (b * g.exp() * k_)
        keys, keep = k_ * (g[..., -1:, :] - g).exp(), g[..., -1:, :].exp()
        identity = torch.eye(k_.shape[-1], dtype=k_.dtype, device=k_.device)
        states = states_before(keep * identity - keys.mT @ old, keys.mT @ new)
        y = (q_ * g.exp()) @ states + (between * (q_ @ k_.mT)) @ (new - old @ states)
        return _from_chunks(y, v)


class UnitLowerInverse(torch.autograd.Function):
    """``(I + A)⁻¹`` of strictly lower triangular A (..., C, C), where C is a power of two.

    Neighbouring diagonal blocks are joined, from single entries on: ``[[P, 0], [A, Q]]⁻¹`` has ``-Q⁻¹ A P⁻¹`` below.
    """

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        inverse = torch.ones_like(lower[..., :1]).unsqueeze(-1)  # (..., blocks, 1, 1)
        width = 1
        while width < size:
            first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
            blocks = lower.unflatten(-1, (-1, 2 * width)).unflatten(-3, (-1, 2 * width))
            diagonal = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            below = -_small_product(_small_product(second, diagonal[..., width:, :width]), first)
            top = torch.cat([first, torch.zeros_like(first)], dim=-1)
            inverse = torch.cat([top, torch.cat([below, second], dim=-1)], dim=-2)
            width *= 2
        inverse = inverse.squeeze(-3)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


class AffineRecurrence(torch.autograd.Function):
    """``S_{m+1} = A_m S_m + B_m`` from ``S_0 = 0``: a product per chunk, forward and backward."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, terms: Tensor) -> Tensor:
        state = torch.zeros_like(terms[0])
        states = [state]
        for factor, term in zip(factors[:-1].unbind(), terms[:-1].unbind(), strict=True):
            state = torch.baddbmm(term, factor, state)
            states.append(state)
        stacked = torch.stack(states)
        ctx.save_for_backward(factors, stacked)
        return stacked

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        factors, states = ctx.saved_tensors
        adjoint = torch.zeros_like(grad[0])
        adjoints = [adjoint]
        for factor, direct in zip(factors.unbind()[::-1], grad.unbind()[::-1], strict=True):
            adjoint = torch.baddbmm(direct, factor.mT, adjoint)
            adjoints.append(adjoint)
        terms = torch.stack(adjoints[:-1][::-1])  # the gradient of S_{m+1}, without that of S_0
        return terms @ states.mT, terms


def states_before(factors: Tensor, terms: Tensor) -> Tensor:
    """Return the state before each chunk, (B, M, H, K, V), where ``S <- A S + B`` with A (B, M, H, K, K)."""
    batch = factors.shape[0]
    rows = (x.transpose(0, 1).flatten(1, 2).contiguous() for x in (factors, terms))
    states = AffineRecurrence.apply(*rows)
    return states.unflatten(1, (batch, -1)).transpose(0, 1)


def _small_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply many small matrices; the tiniest take longer to launch than to compute."""
    return a @ b if a.shape[-1] > _TINY else (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _carry(written: Tensor, keep: Tensor) -> Tensor:
    """Return the state before each chunk, (B, M, H, K, V), given its writes and kept shares (B, M, H, K, 1)."""
    state = torch.zeros_like(written[:, 0])
    states = []
    for kept, term in zip(keep.unbind(1), written.unbind(1), strict=True):
        states.append(state)
        state = kept * state + term
    return torch.stack(states, dim=1)


def _to_chunks(x: Tensor) -> Tensor:
    """Cut into chunks: (B, N, H, X) -> (B, M, H, C, X), at least float32, with zeros behind the end."""
    x = F.pad(at_least_float32(x), (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).transpose(2, 3)


def _from_chunks(y: Tensor, like: Tensor) -> Tensor:
    """Join chunks: (B, M, H, C, V) -> (B, N, H, V) of the length and dtype of ``like``."""
    return y.transpose(2, 3).flatten(1, 2)[:, : like.shape[1]].to(like.dtype)
