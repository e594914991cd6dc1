"""Causal depthwise convolution over the last few tokens of a sequence, with a state and packed sequences.

Shapes: B batch, N sequence, D channels, W kernel width, S packed sequences.
"""

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``y_t = sum_j weight_j x_{t-j}``, where the tokens before a sequence's first are its ``tail``.

    Args:
        x: (B, N, D).
        weight: (W, D); ``weight[0]`` acts on the token itself.
        tail: the W - 1 inputs before the first, oldest first, (B, W - 1, D) or (S, W - 1, D).
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.

    Returns:
        y (B, N, D) and the tail after the last token, of the shape of ``tail``.
    """
    width, length = len(weight), x.shape[1]
    if cu_seqlens is None:
        extended = torch.cat([tail.to(x.dtype), x], dim=1)
        taps = [extended[:, width - 1 - j : width - 1 - j + length] for j in range(width)]
        return _weighted_sum(taps, weight), extended[:, length:].to(tail.dtype)

    # One pool of rows holds the tokens, then every sequence's tail; taps that reach before a start point into the tail.
    pool = torch.cat([x[0], tail.to(x.dtype).flatten(0, 1)])
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    token = torch.arange(length, device=x.device)
    sequence = torch.searchsorted(ends, token, right=True)
    rows = [_rows(token - j, sequence, starts, length, width) for j in range(width)]
    y = _weighted_sum([pool[r] for r in rows], weight).unsqueeze(0)
    last = torch.arange(len(starts), device=x.device)
    new_tail = [_rows(ends - back, last, starts, length, width) for back in range(width - 1, 0, -1)]
    if not new_tail:
        return y, tail
    return y, pool[torch.stack(new_tail, dim=1)].to(tail.dtype)


def _weighted_sum(taps: list[Tensor], weight: Tensor) -> Tensor:
    y = taps[0] * weight[0]
    for tap, w in zip(taps[1:], weight[1:], strict=True):
        y = torch.addcmul(y, tap, w)
    return y


def _rows(token: Tensor, sequence: Tensor, starts: Tensor, length: int, width: int) -> Tensor:
    """Row of the pool that holds ``token`` of ``sequence``, which may lie up to W - 1 tokens before its start."""
    before = token - starts[sequence]
    return torch.where(before >= 0, token, length + (sequence + 1) * (width - 1) + before)
