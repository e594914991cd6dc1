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
    WY form.

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
        scores, queries = between * (q_ @ k_.mT), q_ * g.exp()
        keys, keep = k_ * (g[..., -1:, :] - g).exp(), g[..., -1:, :].exp()
        state = torch.zeros_like(k_[:, 0].mT @ v_[:, 0])
        outputs = []
        for m in range(q_.shape[1]):
            values = new[:, m] - old[:, m] @ state
            outputs.append(queries[:, m] @ state + scores[:, m] @ values)
            state = keep[:, m] * state + keys[:, m].mT @ values
        return _from_chunks(torch.stack(outputs, dim=1), v)


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
            below = -second @ diagonal[..., width:, :width] @ first
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


def _carry(written: Tensor, keep: Tensor) -> Tensor:
    """Return the state before each chunk, (B, M, H, K, V), given its writes and kept shares (B, M, H, K, 1)."""
    state = torch.zeros_like(written[:, 0])
    states = []
    for m in range(written.shape[1]):
        states.append(state)
        state = keep[:, m] * state + written[:, m]
    return torch.stack(states, dim=1)


def _to_chunks(x: Tensor) -> Tensor:
    """Cut into chunks: (B, N, H, X) -> (B, M, H, C, X), at least float32, with zeros behind the end."""
    x = F.pad(at_least_float32(x), (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return x.unflatten(1, (-1, CHUNK)).transpose(2, 3)


def _from_chunks(y: Tensor, like: Tensor) -> Tensor:
    """Join chunks: (B, M, H, C, V) -> (B, N, H, V) of the length and dtype of ``like``."""
    return y.transpose(2, 3).flatten(1, 2)[:, : like.shape[1]].to(like.dtype)
