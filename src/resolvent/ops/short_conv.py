"""Causal depthwise convolution over the last few tokens of a sequence, with a state and packed sequences.

Shapes: B batch, N sequence, D channels, W kernel width, S packed sequences.
"""

from typing import Any

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Compute ``y_t = sum_j weight_j x_{t-j}``, (B, N, D); the tokens before a sequence's first are its ``tail``.

    Args:
        x: (B, N, D).
        weight: (W, D); ``weight[0]`` acts on the token itself.
        tail: the conv state, W - 1 inputs before the first, oldest first, (B, W - 1, D) or (S, W - 1, D).
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.

    Example:
        >>> x, weight = torch.randn(1, 70, 8), torch.randn(4, 8)  # 8 channels, 4 taps
        >>> y = causal_conv(x, weight, torch.zeros(1, 3, 8))
        >>> packed = causal_conv(x, weight, torch.zeros(2, 3, 8), cu_seqlens=torch.tensor([0, 5, 70]))
        >>> torch.equal(y[:, :5], packed[:, :5]), packed.shape
        (True, torch.Size([1, 70, 8]))
    """
    width, length = len(weight), x.shape[1]
    if cu_seqlens is None and length == 1:  # the tail has the rows of all other taps
        return (torch.cat([tail.to(x.dtype), x], dim=1) * weight.flip(0)).sum(1, keepdim=True)
    if cu_seqlens is None:
        return _DepthwiseConv.apply(torch.cat([tail.to(x.dtype), x], dim=1), weight)

    # 1. Convolve across the starts of the sequences.
    y_1TD = causal_conv(x, weight, x.new_zeros(1, width - 1, x.shape[-1]))
    # 2. Correct the first W - 1 outputs of every sequence: they saw the inputs that happened to stand before the start
    #    instead of the tail.
    offsets = cu_seqlens.to(x.device, non_blocking=True)
    starts, ends = offsets[:-1], offsets[1:]
    seen_SWD = _new_tails(x[0], torch.zeros_like(tail), torch.zeros_like(starts), starts)
    correction_SWD = causal_conv(torch.zeros_like(tail, dtype=x.dtype), weight, tail - seen_SWD)
    rows_SW = starts.unsqueeze(1) + torch.arange(width - 1, device=x.device)
    inside_SW1 = (rows_SW < ends.unsqueeze(1)).unsqueeze(-1)
    correction_1TD = (correction_SWD * inside_SW1).flatten(0, 1).unsqueeze(0)
    return y_1TD.index_add(1, rows_SW.clamp(max=length - 1).flatten(), correction_1TD)


def next_tail(x: Tensor, tail: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the last W - 1 inputs of every sequence, its old tail among them; arguments as in ``causal_conv``.

    Example:
        >>> x, tail = torch.randn(1, 70, 8), torch.zeros(1, 3, 8)
        >>> torch.equal(next_tail(x, tail), x[:, -3:])
        True
        >>> next_tail(x, torch.zeros(2, 3, 8), cu_seqlens=torch.tensor([0, 5, 70])).shape
        torch.Size([2, 3, 8])
    """
    length, kept = x.shape[1], tail.shape[1]
    if cu_seqlens is None:
        return (x[:, length - kept :] if length >= kept else torch.cat([tail[:, length:], x], dim=1)).to(tail.dtype)
    offsets = cu_seqlens.to(x.device, non_blocking=True)
    return _new_tails(x[0], tail, offsets[:-1], offsets[1:])


def _new_tails(x_TD: Tensor, tail_SWD: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Return the last W - 1 inputs of every sequence, (S, W - 1, D), from its old tail where it is shorter."""
    kept = tail_SWD.shape[1]
    back = torch.arange(kept, 0, -1, device=x_TD.device)
    rows_SW = ends.unsqueeze(1) - back
    old_SW = (ends - starts).unsqueeze(1) - back + kept
    from_x_SWD = x_TD[rows_SW.clamp(min=0)].to(tail_SWD.dtype)
    index_SWD = old_SW.clamp(min=0, max=max(kept - 1, 0)).unsqueeze(-1).expand_as(tail_SWD)
    from_tail_SWD = tail_SWD.gather(1, index_SWD)
    return torch.where((rows_SW >= starts.unsqueeze(1)).unsqueeze(-1), from_x_SWD, from_tail_SWD)


class _DepthwiseConv(torch.autograd.Function):
    """``y_t = sum_j weight_j x_{t + W - 1 - j}``: x (B, N + W - 1, D), weight (W, D) -> (B, N, D).

    A few scaled additions of shifted rows: the convolutions of cuDNN and oneDNN want channels first, and transposing
    the tensors costs more than the sum. P are the rows with the tail, N + W - 1.
    """

    @staticmethod
    def forward(ctx: Any, x_BPD: Tensor, weight_WD: Tensor) -> Tensor:
        ctx.save_for_backward(x_BPD, weight_WD)
        taps = _taps(x_BPD, len(weight_WD))
        if len(taps) == 1:
            return taps[0] * weight_WD[0]
        y_BND = taps[0] * weight_WD[0]
        for tap_BND, weight_D in zip(taps[1:-1], weight_WD[1:-1], strict=True):
            y_BND.addcmul_(tap_BND, weight_D)
        return torch.addcmul(y_BND, taps[-1], weight_WD[-1])  # not in place: see ops/__init__.py

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BND: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        x_BPD, weight_WD = ctx.saved_tensors
        grad_x_BPD, grad_weight_WD = torch.zeros_like(x_BPD), torch.zeros_like(weight_WD)
        length, width = grad_BND.shape[1], len(weight_WD)
        # Rows that fit the processor's cache are read from memory once, not once per tap.
        block = 128 if x_BPD.device.type == "cpu" else max(length, 1)
        for start in range(0, length, block):
            part = slice(start, start + block + width - 1)
            taps = zip(_taps(x_BPD[:, part], width), _taps(grad_x_BPD[:, part], width), strict=True)
            for j, (tap_BND, grad_tap_BND) in enumerate(taps):
                grad_tap_BND.addcmul_(grad_BND[:, start : start + block], weight_WD[j])
                grad_weight_WD[j] += (grad_BND[:, start : start + block] * tap_BND).sum(dim=(0, 1))
        return grad_x_BPD, grad_weight_WD


def _taps(x_BPD: Tensor, width: int) -> list[Tensor]:
    """Return the rows that each tap of the kernel meets, nearest first: views (B, N, D)."""
    length = x_BPD.shape[1] - width + 1
    return [x_BPD[:, width - 1 - j : width - 1 - j + length] for j in range(width)]
