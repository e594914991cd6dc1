"""Triton kernels of the short convolution before the memory, with SiLU and unit length (``ops.queries_keys_values``).

Everything between the projection and the memory is one pass over memory forward, and one backward: what is kept for the
gradient is the projection alone.

A program takes a tile of tokens and one head of the queries, the keys or the values. Shapes: T tokens, H heads, K head
width, C = 3HK channels, W convolution width, S sequences.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend as _backend
from .launch import contiguous

_kernel: Any = triton.jit
_PRECISION = tl.constexpr("tf32x3")  # of float32 products
_TINY = tl.constexpr(1e-12)  # that of ``ops.normalize.unit_length``
_TOKENS = 32
"""Tokens of a tile: all rows that the gradient of one needs lie in registers."""
_TILES = 8
"""Tiles that a program walks over, so that the gradient of the taps is summed up before it is written."""


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
    back = start - tokens  # 1 for the last row of the tail
    kept = (sequence * (W - 1) + (W - 1 - back)) * C
    before = (back > 0) & (back < W) & (tokens + back < end)
    old = tl.load(tail + kept[:, None] + channels[None, :], mask=before[:, None] & wanted[None, :], other=0.0)
    return found.to(tl.float32) + old.to(tl.float32)


@_kernel
def _convolved(x, stride, tail, weight, sequence, tokens, start, end, channels, wanted, C, W: tl.constexpr):
    """What the convolution gives, the rows that it reads, nearest first, and the taps that they meet."""
    total, rows, taps = tl.zeros([tokens.shape[0], channels.shape[0]], tl.float32), (), ()
    for j in tl.static_range(W):
        row = _row(x, stride, tail, sequence, tokens - j, start, end, channels, wanted, C, W)
        tap = tl.load(weight + j * C + channels, mask=wanted, other=0.0).to(tl.float32)
        total += tap[None, :] * row
        rows, taps = rows + (row,), taps + (tap,)  # noqa: RUF005 (Triton has no starred tuples)
    return total, rows, taps


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
    given, _, _ = _convolved(
        x, stride, tail, weight, sequence, tokens, start, end, role * HK + columns, wanted, 3 * HK, W
    )
    given *= tl.sigmoid(given)
    if role < 2:
        given *= tl.rsqrt(tl.sum(given * given, 1) + K * _TINY)[:, None]
    out = _of_role(role, q, k, v) + tokens[:, None] * HK + columns[None, :]
    tl.store(out, given.to(q.dtype.element_ty), mask=(tokens < total)[:, None] & wanted[None, :])


@_kernel
def _gradient(
    upstream, x, stride, tail, weight, sequence, tokens, start, end, channels, columns, wanted, C, HK, K, UNIT,
    W: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradient of rows of the projections, as far as the tokens here met them; of what the convolution gave at these
    tokens, zero at those that are none of the sequence's; and the rows that it read."""
    inside = ((tokens >= start) & (tokens < end))[:, None] & wanted[None, :]
    grad = tl.load(upstream + tokens[:, None] * HK + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    given, read, taps = _convolved(x, stride, tail, weight, sequence, tokens, start, end, channels, wanted, C, W)
    gate = tl.sigmoid(given)
    if UNIT:
        activated = given * gate
        inverse = tl.rsqrt(tl.sum(activated * activated, 1) + K * _TINY)
        along = tl.sum(activated * grad, 1) * inverse * inverse
        grad = (grad - activated * along[:, None]) * inverse[:, None]
    of_conv = grad * gate * (1 + given * (1 - gate))
    of_rows, moved = taps[0][None, :] * of_conv, of_conv.to(x.dtype.element_ty)
    for j in tl.static_range(1, W):
        # Rows move between threads as a product with ones off the diagonal: tensor cores are idle here.
        shift = (tl.arange(0, T)[None, :] == tl.arange(0, T)[:, None] + j) & (tokens + j < end)[:, None]
        of_rows += taps[j][None, :] * tl.dot(shift.to(moved.dtype), moved, input_precision=_PRECISION)
    return of_rows, of_conv, read


@_kernel
def _backward(
    grad_q, grad_k, grad_v, x, weight, tail, bounds, grad_x, grad_weight, stride, length, total, heads,
    PACKED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """A row's gradient comes from the W tokens that met it: the last W - 1 rows of a tile are the next one's first."""
    role, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    columns, wanted, HK = head * K + tl.arange(0, BK), tl.arange(0, BK) < K, heads * K
    channels, C, upstream = role * HK + columns, 3 * HK, _of_role(role, grad_q, grad_k, grad_v)
    taps = tl.arange(0, TAPS)
    grad_taps = tl.zeros([TAPS, BK], tl.float32)
    own = tl.arange(0, T) < T - W + 1
    for tile in range(TILES):
        tokens = (tl.program_id(0).to(tl.int64) * TILES + tile) * (T - W + 1) + tl.arange(0, T)
        sequence, start, end = _sequence(tokens, bounds, length, total, PACKED)
        of_rows, of_conv, read = _gradient(
            upstream, x, stride, tail, weight, sequence, tokens, start, end, channels, columns, wanted, C, HK, K,
            role < 2, W, T, BK,
        )  # fmt: skip
        of_conv = tl.where(own[:, None], of_conv, 0.0)
        for j in tl.static_range(W):
            grad_taps += tl.where(taps[:, None] == j, tl.sum(of_conv * read[j], 0)[None, :], 0.0)  # pyrefly: ignore[bad-index]
        mask = (own & (tokens < total))[:, None] & wanted[None, :]
        tl.store(grad_x + tokens[:, None] * C + channels[None, :], of_rows.to(grad_x.dtype.element_ty), mask=mask)
    place = (tl.program_id(0).to(tl.int64) * W + taps[:, None]) * C + channels[None, :]
    tl.store(grad_weight + place, grad_taps, mask=(taps < W)[:, None] & wanted[None, :])


@_kernel
def _backward_tail(
    grad_q, grad_k, grad_v, x, weight, tail, bounds, grad_tail, stride, length, total, heads,
    PACKED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The rows of a tail are read as the W - 1 before a sequence's first."""
    number, role, head = tl.program_id(0).to(tl.int64), tl.program_id(1) // heads, tl.program_id(1) % heads
    columns, wanted, HK = head * K + tl.arange(0, BK), tl.arange(0, BK) < K, heads * K
    channels, C, upstream = role * HK + columns, 3 * HK, _of_role(role, grad_q, grad_k, grad_v)
    if PACKED:
        first, stop = tl.load(bounds + total + number), tl.load(bounds + total + number + 1)
    else:
        first, stop = number * length, (number + 1) * length
    rows, everywhere = tl.arange(0, T), tl.zeros([T], tl.int64)
    sequence, start, end = everywhere + number, everywhere + first, everywhere + stop
    of_rows, _, _ = _gradient(
        upstream, x, stride, tail, weight, sequence, start - (W - 1) + rows, start, end, channels, columns, wanted, C,
        HK, K, role < 2, W, T, BK,
    )  # fmt: skip
    place = (number * (W - 1) + rows[:, None]) * C + channels[None, :]
    tl.store(grad_tail + place, of_rows.to(grad_tail.dtype.element_ty), mask=(rows < W - 1)[:, None] & wanted[None, :])


def _refuses(dtype: torch.dtype, *_: int) -> str | None:
    """What the kernels cannot do."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernel computes in float32, the tensors are {dtype}"
    return None


@_backend.register("queries_keys_values", "triton", refuses=_refuses)
def _queries_keys_values_triton(
    projected: Tensor, weight: Tensor, tail: Tensor, num_heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        # One table, so that a program finds a token's sequence and its bounds without a search.
        bounds = cu_seqlens.to(projected.device, torch.int64)
        token = torch.arange(projected.shape[1], device=projected.device)
        cu_seqlens = torch.cat([torch.searchsorted(bounds[1:], token, right=True), bounds])
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
        arguments, sizes = _arguments(projected, weight, tail, bounds, num_heads)
        tokens = projected.shape[0] * projected.shape[1]
        with torch.cuda.device_of(projected):
            _forward[(triton.cdiv(tokens, _TOKENS), 3 * num_heads)](
                *arguments[:4], *outputs, *arguments[4:], T=_TOKENS, num_warps=4, **sizes
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
    wants_tail: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``projected``, of the weight by program, to be summed up, and of the tail, empty if not wanted."""
    outputs = _room_for_gradients(projected, weight, tail, wants_tail)
    if projected.numel():
        arguments, sizes = _arguments(projected, weight, tail, bounds, num_heads)
        upstream = [contiguous(x) for x in (grad_q, grad_k, grad_v)]
        grad_x, grad_weight, grad_tail = outputs
        with torch.cuda.device_of(projected):
            _backward[(len(grad_weight), 3 * num_heads)](
                *upstream, *arguments[:4], grad_x, grad_weight, *arguments[4:],
                T=_TOKENS, TILES=_TILES, TAPS=triton.next_power_of_2(len(weight)), num_warps=4, num_stages=1, **sizes,
            )  # fmt: skip
            if wants_tail and tail.numel():
                _backward_tail[(len(tail), 3 * num_heads)](
                    *upstream, *arguments[:4], grad_tail, *arguments[4:],
                    T=max(16, triton.next_power_of_2(2 * tail.shape[1])), num_warps=4, **sizes,
                )  # fmt: skip
    return outputs


@torch.library.register_fake("resolvent::queries_keys_values_backward")
def _(grad_q, grad_k, grad_v, projected, weight, tail, bounds, num_heads, wants_tail):
    return _room_for_gradients(projected, weight, tail, wants_tail)


def _room_for_gradients(
    projected: Tensor, weight: Tensor, tail: Tensor, wants_tail: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_queries_keys_values_backward`` returns, yet to be filled."""
    programs = -(-projected.shape[0] * projected.shape[1] // ((_TOKENS - len(weight) + 1) * _TILES))
    return (
        projected.new_empty(projected.shape),
        weight.new_empty(programs, *weight.shape, dtype=torch.float32),
        tail.new_empty(tail.shape if wants_tail else 0),
    )


def _arguments(
    projected: Tensor, weight: Tensor, tail: Tensor, bounds: Tensor | None, num_heads: int
) -> tuple[list[Any], dict[str, Any]]:
    """What all kernels take: tensors, strides and sizes; and what they are compiled for."""
    batch, length, channels = projected.shape
    rows = projected.flatten(0, 1)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    width = channels // (3 * num_heads)
    tensors = [rows, *map(contiguous, (weight, tail, bounds))]
    sizes = dict(PACKED=bounds is not None, K=width, BK=max(16, triton.next_power_of_2(width)), W=len(weight))
    return [*tensors, rows.stride(0), length, batch * length, num_heads], sizes


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


@torch.autograd.function.once_differentiable
def _backward_of_all(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    projected, weight, tail, bounds = ctx.saved_tensors
    grad_x, grad_weight, grad_tail = _queries_keys_values_backward(
        *grads, projected, weight, tail, bounds, ctx.num_heads, ctx.needs_input_grad[2]
    )
    return (
        grad_x,
        grad_weight.sum(0).to(weight.dtype),
        grad_tail if ctx.needs_input_grad[2] else None,
        None,
        None,
    )


torch.library.register_autograd("resolvent::queries_keys_values", _backward_of_all, setup_context=_keep_for_gradient)
