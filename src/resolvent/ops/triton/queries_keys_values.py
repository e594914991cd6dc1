"""Triton kernels of the short convolution before the memory, with SiLU and unit length (``ops.queries_keys_values``).

Everything between the projection and the memory is one pass over memory, two for the gradient, which keeps the
projection alone.

A program takes a tile of tokens and one head of the queries, the keys or the values. Shapes: T tokens, H heads, K head
width, C = 3HK channels, W convolution width, S sequences.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend as _backend
from ..packed import sequence_numbers
from .launch import contiguous, more_than_float32

_kernel: Any = triton.jit
_TINY = tl.constexpr(1e-12)  # that of ``ops.normalize.unit_length``
_TOKENS = 32
"""Tokens of a tile."""
_SUMMED = dict(T=64, CHANNELS=64, TILES=4)
"""Tokens, channels and tiles of a program that sums up the gradient of the taps."""


@_kernel
def _sequence(tokens, bounds, length, total, PACKED: tl.constexpr):
    """Sequence of every token, its first token and its last token + 1."""
    if PACKED:
        inside = tokens < total
        sequence = tl.load(bounds + tokens, mask=inside, other=0)
        start = tl.load(bounds + total + sequence, mask=inside, other=0)
        end = tl.load(bounds + total + sequence + 1, mask=inside, other=0)
    else:
        sequence = tokens // length
        start = sequence * length
        end = tl.minimum(start + length, total)
    return sequence, start, end


@_kernel
def _row(x, stride, tail, sequence, tokens, start, end, channels, wanted, C, W: tl.constexpr):
    """Projections of tokens, out of the tail where they lie before the first; zero from the end on: [T, K]."""
    here = (tokens >= start) & (tokens < end)
    found = tl.load(x + tokens[:, None] * stride + channels[None, :], mask=here[:, None] & wanted[None, :], other=0.0)
    row = found.to(tl.float32)
    back = start - tokens  # 1 for the last row of the tail
    before = (back > 0) & (back < W) & (tokens + back < end)
    if tl.max(before.to(tl.int32), 0) > 0:  # hardly ever
        kept = (sequence * (W - 1) + (W - 1 - back)) * C
        mask = before[:, None] & wanted[None, :]
        row += tl.load(tail + kept[:, None] + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    return row


@_kernel
def _convolved(x, stride, tail, weight, sequence, tokens, start, end, channels, wanted, C, W: tl.constexpr):
    total = tl.zeros([tokens.shape[0], channels.shape[0]], tl.float32)
    for j in tl.static_range(W):
        tap = tl.load(weight + j * C + channels, mask=wanted, other=0.0).to(tl.float32)
        total += tap[None, :] * _row(x, stride, tail, sequence, tokens - j, start, end, channels, wanted, C, W)
    return total


@_kernel
def _of_role(role, of_q, of_k, of_v):
    """One of three pointers."""
    chosen = of_q
    if role == 1:
        chosen = of_k
    elif role == 2:
        chosen = of_v
    return chosen


@_kernel
def _forward(
    x, weight, tail, bounds, q, k, v, stride, length, total, heads,
    PACKED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    role, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    columns, wanted, HK = head * K + tl.arange(0, BK), tl.arange(0, BK) < K, heads * K
    tokens = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    sequence, start, end = _sequence(tokens, bounds, length, total, PACKED)
    given = _convolved(
        x, stride, tail, weight, sequence, tokens, start, end, role * HK + columns, wanted, 3 * HK, W
    )  # fmt: skip
    given *= tl.sigmoid(given)
    if role < 2:
        given *= tl.rsqrt(tl.sum(given * given, 1) + K * _TINY)[:, None]
    out = _of_role(role, q, k, v) + tokens[:, None] * HK + columns[None, :]
    tl.store(out, given.to(q.dtype.element_ty), mask=(tokens < total)[:, None] & wanted[None, :])


@_kernel
def _backward_activation(
    grad_q, grad_k, grad_v, x, weight, tail, bounds, grad_conv, stride, length, total, heads,
    PACKED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradient of what the convolution gave, (T, C)."""
    role, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    columns, wanted, HK = head * K + tl.arange(0, BK), tl.arange(0, BK) < K, heads * K
    tokens = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    mask = (tokens < total)[:, None] & wanted[None, :]
    upstream = _of_role(role, grad_q, grad_k, grad_v) + tokens[:, None] * HK + columns[None, :]
    grad = tl.load(upstream, mask=mask, other=0.0).to(tl.float32)
    sequence, start, end = _sequence(tokens, bounds, length, total, PACKED)
    given = _convolved(
        x, stride, tail, weight, sequence, tokens, start, end, role * HK + columns, wanted, 3 * HK, W
    )  # fmt: skip
    gate = tl.sigmoid(given)
    if role < 2:
        activated = given * gate
        inverse = tl.rsqrt(tl.sum(activated * activated, 1) + K * _TINY)
        along = tl.sum(activated * grad, 1) * inverse * inverse
        grad = (grad - activated * along[:, None]) * inverse[:, None]
    grad *= gate * (1 + given * (1 - gate))
    out = grad_conv + tokens[:, None] * 3 * HK + role * HK + columns[None, :]
    tl.store(out, grad.to(grad_conv.dtype.element_ty), mask=mask)


@_kernel
def _gathered(grad_conv, row, weight, tokens, start, end, channels, C, W: tl.constexpr, TAPS: tl.constexpr):
    """Gradients of rows of the projections, from the W tokens that met them, and of the taps, [TAPS, K]."""
    of_row, of_taps = tl.zeros_like(row), tl.zeros([TAPS, channels.shape[0]], tl.float32)
    for j in tl.static_range(W):
        met = ((tokens + j >= start) & (tokens + j < end))[:, None] & (channels < C)[None, :]
        grad = tl.load(grad_conv + (tokens + j)[:, None] * C + channels[None, :], mask=met, other=0.0).to(tl.float32)
        of_row += grad * tl.load(weight + j * C + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
        of_tap = tl.sum(grad * row, 0)
        of_taps += tl.where(tl.arange(0, TAPS)[:, None] == j, tl.expand_dims(of_tap, 0), 0.0)
    return of_row, of_taps


@_kernel
def _backward_conv(
    x, weight, bounds, grad_conv, grad_x, grad_weight, stride, length, total, C,
    PACKED: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    program, channels = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    grad_taps = tl.zeros([TAPS, CHANNELS], tl.float32)
    for tile in range(TILES):
        tokens = (program * TILES + tile) * T + tl.arange(0, T)
        _, start, end = _sequence(tokens, bounds, length, total, PACKED)
        mask = (tokens < total)[:, None] & (channels < C)[None, :]
        row = tl.load(x + tokens[:, None] * stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        of_row, of_taps = _gathered(grad_conv, row, weight, tokens, start, end, channels, C, W, TAPS)
        grad_taps += of_taps
        tl.store(grad_x + tokens[:, None] * C + channels[None, :], of_row.to(grad_x.dtype.element_ty), mask=mask)
    taps = tl.arange(0, TAPS)
    place = (program * W + taps[:, None]) * C + channels[None, :]
    tl.store(grad_weight + place, grad_taps, mask=(taps < W)[:, None] & (channels < C)[None, :])


@_kernel
def _backward_tail(
    tail, weight, bounds, grad_conv, grad_tail, grad_weight, length, total, C,
    PACKED: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The rows of a tail are the W - 1 tokens before a sequence's first."""
    sequence, channels = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if PACKED:
        start, end = tl.load(bounds + total + sequence), tl.load(bounds + total + sequence + 1)
    else:
        start, end = sequence * length, (sequence + 1) * length
    taps = tl.arange(0, TAPS)
    place = (sequence * (W - 1) + taps[:, None]) * C + channels[None, :]
    mask = (taps < W - 1)[:, None] & (channels < C)[None, :]
    row = tl.load(tail + place, mask=mask, other=0.0).to(tl.float32)
    tokens = start - (W - 1) + taps
    of_row, of_taps = _gathered(grad_conv, row, weight, tokens, start, end, channels, C, W, TAPS)
    tl.store(grad_tail + place, of_row.to(grad_tail.dtype.element_ty), mask=mask)
    place = (sequence * W + taps[:, None]) * C + channels[None, :]
    tl.store(grad_weight + place, of_taps, mask=(taps < W)[:, None] & (channels < C)[None, :])


@_backend.register("queries_keys_values", "triton", refuses=more_than_float32)
def _queries_keys_values_triton(
    projected: Tensor, weight: Tensor, tail: Tensor, num_heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        # One table, so that a program finds a token's sequence and its bounds without a search.
        bounds = cu_seqlens.to(projected.device, torch.int64, non_blocking=True)
        cu_seqlens = torch.cat([sequence_numbers(bounds, projected.shape[1]), bounds])
    return _queries_keys_values(projected, weight, tail, cu_seqlens, num_heads)


@_backend.operator("queries_keys_values")
def _queries_keys_values(
    projected: Tensor, weight: Tensor, tail: Tensor, bounds: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, N, HK).

    ``bounds`` tells packed sequences apart: the sequence of every token, followed by the offsets of all, int64 on the
    device.
    """
    outputs = _room(projected)
    if projected.numel():
        tensors, lengths, sizes = _arguments(projected, weight, tail, bounds, num_heads)
        with torch.cuda.device_of(projected):
            _forward[(triton.cdiv(len(tensors[0]), _TOKENS), 3 * num_heads)](
                *tensors, *outputs, *lengths, num_heads, T=_TOKENS, num_warps=4, **sizes
            )
    return outputs


@torch.library.register_fake("resolvent::queries_keys_values")
def _(projected, weight, tail, bounds, num_heads):
    return _room(projected)


def _room(projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_queries_keys_values`` returns, yet to be filled."""
    *rows, channels = projected.shape
    q, k, v = (projected.new_empty(*rows, channels // 3) for _ in range(3))
    return q, k, v


@_backend.operator("queries_keys_values_backward")
def _queries_keys_values_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    projected: Tensor,
    weight: Tensor,
    tail: Tensor,
    bounds: Tensor | None,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``projected``, of the weight by program, to be summed up, and of the tail."""
    outputs = _room_for_gradients(projected, weight, tail)
    if not projected.numel():
        torch._foreach_zero_(outputs)
        return outputs
    tensors, lengths, sizes = _arguments(projected, weight, tail, bounds, num_heads)
    rows, taps, tails, bounds = tensors
    upstream = [contiguous(x) for x in (grad_q, grad_k, grad_v)]
    grad_x, grad_weight, grad_tail = outputs
    grad_conv = torch.empty_like(grad_x)
    of_tails, of_rows = grad_weight.tensor_split([len(tail)])
    with torch.cuda.device_of(projected):
        _backward_activation[(triton.cdiv(len(rows), _TOKENS), 3 * num_heads)](
            *upstream, *tensors, grad_conv, *lengths, num_heads, T=_TOKENS, num_warps=4, **sizes
        )
        width, channels = len(weight), projected.shape[-1]
        shared = dict(PACKED=bounds is not None, W=width, TAPS=triton.next_power_of_2(width), num_warps=4)
        blocks = triton.cdiv(channels, _SUMMED["CHANNELS"])
        _backward_conv[(len(of_rows), blocks)](
            rows, taps, bounds, grad_conv, grad_x, of_rows, *lengths, channels, **_SUMMED, **shared
        )
        _backward_tail[(len(tail), blocks)](
            tails,
            taps,
            bounds,
            grad_conv,
            grad_tail,
            of_tails,
            *lengths[1:],
            channels,
            CHANNELS=_SUMMED["CHANNELS"],
            **shared,
        )
    return outputs


@torch.library.register_fake("resolvent::queries_keys_values_backward")
def _(grad_q, grad_k, grad_v, projected, weight, tail, bounds, num_heads):
    return _room_for_gradients(projected, weight, tail)


def _room_for_gradients(projected: Tensor, weight: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_queries_keys_values_backward`` returns, yet to be filled; tails have programs of their own."""
    programs = tail.shape[0] + -(-projected.shape[0] * projected.shape[1] // (_SUMMED["T"] * _SUMMED["TILES"]))
    return (
        projected.new_empty(projected.shape),
        weight.new_empty(programs, *weight.shape, dtype=torch.float32),
        tail.new_empty(tail.shape),
    )


def _arguments(
    projected: Tensor, weight: Tensor, tail: Tensor, bounds: Tensor | None, num_heads: int
) -> tuple[list[Any], list[int], dict[str, Any]]:
    """What the kernels take: tensors; stride of a row, tokens of a sequence and of all; what they are compiled for."""
    batch, length, channels = projected.shape
    rows = projected.flatten(0, 1)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    width = channels // (3 * num_heads)
    tensors = [rows, *map(contiguous, (weight, tail, bounds))]
    sizes = dict(PACKED=bounds is not None, K=width, BK=triton.next_power_of_2(width), W=len(weight))
    return tensors, [rows.stride(0), length, batch * length], sizes


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


@torch.autograd.function.once_differentiable
def _backward_of_all(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    projected, weight, tail, bounds = ctx.saved_tensors
    grad_x, grad_weight, grad_tail = _queries_keys_values_backward(
        *grads, projected, weight, tail, bounds, ctx.num_heads
    )
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_tail, None, None


torch.library.register_autograd("resolvent::queries_keys_values", _backward_of_all, setup_context=_keep_for_gradient)
