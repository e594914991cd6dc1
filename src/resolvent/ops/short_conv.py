"""Causal depthwise convolution over the last few tokens of a sequence, with a state and packed sequences.

Shapes: B batch, N sequence, D channels, W kernel width, S packed sequences.
"""

from typing import Any

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """``y_t = sum_j weight_j x_{t-j}``, where the tokens before a sequence's first are its ``tail``: (B, N, D).

    Args:
        x: (B, N, D).
        weight: (W, D); ``weight[0]`` acts on the token itself.
        tail: the W - 1 inputs before the first, oldest first, (B, W - 1, D) or (S, W - 1, D).
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.
    """
    width, length = len(weight), x.shape[1]
    if cu_seqlens is None:
        return _DepthwiseConv.apply(torch.cat([tail.to(x.dtype), x], dim=1), weight)

    # Convolve across the starts, and put right the first W - 1 outputs of every sequence: they saw the inputs that
    # happened to stand before the start, and should have seen the tail.
    y = causal_conv(x, weight, x.new_zeros(1, width - 1, x.shape[-1]))
    offsets = cu_seqlens.to(x.device, non_blocking=True)
    starts, ends = offsets[:-1], offsets[1:]
    seen = _new_tails(x[0], torch.zeros_like(tail), torch.zeros_like(starts), starts)
    correction = causal_conv(torch.zeros_like(tail, dtype=x.dtype), weight, tail - seen)
    rows = starts.unsqueeze(1) + torch.arange(width - 1, device=x.device)
    inside = (rows < ends.unsqueeze(1)).unsqueeze(-1)
    return y.index_add(1, rows.clamp(max=length - 1).flatten(), (correction * inside).flatten(0, 1).unsqueeze(0))


def next_tail(x: Tensor, tail: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The last W - 1 inputs of every sequence, its old tail among them; arguments as of ``causal_conv``."""
    length, kept = x.shape[1], tail.shape[1]
    if cu_seqlens is None:
        return (x[:, length - kept :] if length >= kept else torch.cat([tail[:, length:], x], dim=1)).to(tail.dtype)
    offsets = cu_seqlens.to(x.device, non_blocking=True)
    return _new_tails(x[0], tail, offsets[:-1], offsets[1:])


def _new_tails(x: Tensor, tail: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The last W - 1 inputs of every sequence (S, W - 1, D), out of its old tail where it is shorter: x is (T, D)."""
    kept = tail.shape[1]
    back = torch.arange(kept, 0, -1, device=x.device)
    rows = ends.unsqueeze(1) - back
    old = (ends - starts).unsqueeze(1) - back + kept
    from_x = x[rows.clamp(min=0)].to(tail.dtype)
    from_tail = tail.gather(1, old.clamp(min=0, max=max(kept - 1, 0)).unsqueeze(-1).expand_as(tail))
    return torch.where((rows >= starts.unsqueeze(1)).unsqueeze(-1), from_x, from_tail)


class _DepthwiseConv(torch.autograd.Function):
    """``y_t = sum_j weight_j x_{t + W - 1 - j}``: x (B, N + W - 1, D), weight (W, D) -> (B, N, D).

    A few scaled additions of shifted rows; the convolutions of cuDNN and oneDNN want channels first, and turning the
    tensors around costs more than the sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        taps = _taps(x, len(weight))
        if len(taps) == 1:
            return taps[0] * weight[0]
        y = taps[0] * weight[0]
        for tap, w in zip(taps[1:-1], weight[1:-1], strict=True):
            y.addcmul_(tap, w)
        return torch.addcmul(y, taps[-1], weight[-1])  # not in place: see ops/__init__.py

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        length = grad.shape[1]
        # Rows that fit the processor's cache are read from memory once, not once a tap.
        block = 128 if x.device.type == "cpu" else max(length, 1)
        for start in range(0, length, block):
            part = slice(start, start + block + len(weight) - 1)
            taps = zip(_taps(x[:, part], len(weight)), _taps(grad_x[:, part], len(weight)), strict=True)
            for j, (tap, grad_tap) in enumerate(taps):
                grad_tap.addcmul_(grad[:, start : start + block], weight[j])
                grad_weight[j] += (grad[:, start : start + block] * tap).sum(dim=(0, 1))
        return grad_x, grad_weight


def _taps(x: Tensor, width: int) -> list[Tensor]:
    """The rows that each tap of the kernel meets, nearest first: views (B, N, D) of (B, N + W - 1, D)."""
    length = x.shape[1] - width + 1
    return [x[:, width - 1 - j : width - 1 - j + length] for j in range(width)]
