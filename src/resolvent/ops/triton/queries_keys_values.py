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
_SUMMED = dict(T=64, TILES=1)
_FORWARD = dict(TOKENS=64, STAGES=3, num_warps=1)
_BACKWARD = dict(TOKENS=64, STAGES=3, num_warps=1)
_VALUES = 128


@_kernel
def _sequence(token, bounds, length, total, PACKED: tl.constexpr):
    """Sequence of a token, its first token and its last token + 1."""
    if PACKED:
        sequence = tl.load(bounds + token).to(tl.int32)
        start = tl.load(bounds + total + sequence).to(tl.int32)
        end = tl.load(bounds + total + sequence + 1).to(tl.int32)
    else:
        sequence = token // length
        start = sequence * length
        end = start + length
    return sequence, start, end


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
def _columns(heads, K: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr):
    """Role of a program's heads, their columns in a row of the role and which of them exist, [HEADS, BK]."""
    groups = (heads + HEADS - 1) // HEADS
    role, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    head, column = group * HEADS + tl.arange(0, HEADS), tl.arange(0, BK)
    return role, head[:, None] * K + column[None, :], (head < heads)[:, None] & (column < K)[None, :]


@_kernel
def _zeros(HEADS: tl.constexpr, BK: tl.constexpr, W: tl.constexpr):
    rows = ()
    for _ in tl.static_range(W):
        rows = rows + (tl.zeros([HEADS, BK], tl.float32),)  # noqa: RUF005 (Triton has no starred tuples)
    return rows


@_kernel
def _loaded(x, stride, wanted, W: tl.constexpr):
    """W rows, one after the other."""
    rows = ()
    for j in tl.static_range(W):
        rows = rows + (tl.load(x + j * stride, mask=wanted, other=0.0).to(tl.float32),)  # noqa: RUF005
    return rows


@_kernel
def _before(x, stride, tail, C, place, wanted, W: tl.constexpr):
    """The W - 1 rows of projections before the one at ``x``, latest first, and a row of zeros.

    ``place`` tells which of its sequence it is; rows before the first are those of the tail.
    """
    rows = ()
    for j in tl.static_range(1, W):
        if place >= j:
            row = tl.load(x - j * stride, mask=wanted, other=0.0).to(tl.float32)
        else:
            row = tl.load(tail + (W - 1 + place - j) * C, mask=wanted, other=0.0).to(tl.float32)
        rows = rows + (row,)  # noqa: RUF005
    return rows + _zeros(x.shape[0], x.shape[1], 1)


@_kernel
def _convolved(rows, taps, W: tl.constexpr):
    total = rows[0] * taps[0]
    for j in tl.static_range(1, W):
        total += rows[j] * taps[j]
    return total


@_kernel
def _sigmoid(x):
    """In 5 instructions of 12: the division of 1 by 1 + exp(-x) that ``tl.sigmoid`` does takes as many as all of this."""
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root


@_kernel
def _forward(
    x, weight, tail, bounds, q, k, v, stride, length, total, heads,
    PACKED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    role, columns, wanted = _columns(heads, K, BK, HEADS)
    HK = heads * K
    channels, C = role * HK + columns, 3 * HK
    first = tl.program_id(0) * TOKENS
    taps, rows = _loaded(weight + channels, C, wanted, W), _zeros(HEADS, BK, W)
    at_x = x + first.to(tl.int64) * stride + channels
    at_out = _of_role(role, q, k, v) + first.to(tl.int64) * HK + columns
    end = first
    for step in tl.range(tl.minimum(TOKENS, total - first), num_stages=STAGES):
        row, token = tl.load(at_x, mask=wanted, other=0.0).to(tl.float32), first + step
        if token == end:
            sequence, start, end = _sequence(token, bounds, length, total, PACKED)
            at_tail = tail + sequence.to(tl.int64) * (W - 1) * C + channels
            rows = _before(at_x, stride, at_tail, C, token - start, wanted, W)
        rows = (row,) + rows[: W - 1]  # noqa: RUF005
        given = _convolved(rows, taps, W)
        given *= _sigmoid(given)
        if role < 2:
            given *= tl.rsqrt(tl.sum(given * given, 1) + K * _TINY)[:, None]
        tl.store(at_out, given.to(q.dtype.element_ty), mask=wanted)
        at_x += stride
        at_out += HK


@_kernel
def _settle(row, token, at_x, at_tail, start, first, last, wanted, C, W: tl.constexpr):
    """Store the gradient of a row of the projections, or of the tail before ``start``, if it is a program's own."""
    if token >= start:
        if (token >= first) & (token < last):
            tl.store(at_x, row.to(at_x.dtype.element_ty), mask=wanted)
    elif (start >= first) & (start < last):
        at_tail += (W - 1 + token - start) * C
        tl.store(at_tail, row.to(at_tail.dtype.element_ty), mask=wanted)


@_kernel
def _settle_all(rows, token, at_x, grad_tail, sequence, start, first, last, wanted, C, W: tl.constexpr):
    """The rows before a token that meet no other any more."""
    for j in tl.static_range(1, W):
        _settle(rows[j - 1], token - j, at_x - j * C, grad_tail + sequence.to(tl.int64) * (W - 1) * C, start, first, last, wanted, C, W)


@_kernel
def _backward(
    grad_q, grad_k, grad_v, x, weight, tail, bounds, grad_x, grad_tail, grad_weight, stride, length, total, heads,
    PACKED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    role, columns, wanted = _columns(heads, K, BK, HEADS)
    HK = heads * K
    channels, C = role * HK + columns, 3 * HK
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, total)
    taps, rows = _loaded(weight + channels, C, wanted, W), _zeros(HEADS, BK, W)
    of_rows, of_taps = _zeros(HEADS, BK, W), _zeros(HEADS, BK, W)
    at_x = x + first.to(tl.int64) * stride + channels
    at_upstream = _of_role(role, grad_q, grad_k, grad_v) + first.to(tl.int64) * HK + columns
    at_out = grad_x + first.to(tl.int64) * C + channels
    sequence, start, end = first, first - W, first
    steps = tl.minimum(first + TOKENS + W - 1, total) - first
    for step in tl.range(steps, num_stages=STAGES):
        token = first + step
        row = tl.load(at_x, mask=wanted, other=0.0).to(tl.float32)
        grad = tl.load(at_upstream, mask=wanted, other=0.0).to(tl.float32)
        if token == end:
            _settle_all(of_rows, token, at_out, grad_tail + channels, sequence, start, first, last, wanted, C, W)
            of_rows = _zeros(HEADS, BK, W)
            sequence, start, end = _sequence(token, bounds, length, total, PACKED)
            at_tail = tail + sequence.to(tl.int64) * (W - 1) * C + channels
            rows = _before(at_x, stride, at_tail, C, token - start, wanted, W)
        rows = (row,) + rows[: W - 1]  # noqa: RUF005
        given = _convolved(rows, taps, W)
        gate = _sigmoid(given)
        if role < 2:
            activated = given * gate
            inverse = tl.rsqrt(tl.sum(activated * activated, 1) + K * _TINY)
            along = tl.sum(activated * grad, 1) * inverse * inverse
            grad = (grad - activated * along[:, None]) * inverse[:, None]
        grad *= gate * (1 + given * (1 - gate))
        mine = tl.where(token < last, grad, 0.0)
        met, summed = (grad * taps[0],), (of_taps[0] + mine * rows[0],)
        for j in tl.static_range(1, W):
            summed = summed + (of_taps[j] + mine * rows[j],)
            met = met + (of_rows[j - 1] + grad * taps[j],)
        of_rows, of_taps = met, summed
        at_tail = grad_tail + sequence.to(tl.int64) * (W - 1) * C + channels
        _settle(of_rows[W - 1], token - (W - 1), at_out - (W - 1) * C, at_tail, start, first, last, wanted, C, W)
        at_x += stride
        at_upstream += HK
        at_out += C
    _settle_all(of_rows, first + steps, at_out, grad_tail + channels, sequence, start, first, last, wanted, C, W)
    for j in tl.static_range(W):
        place = (tl.program_id(0).to(tl.int64) * W + j) * C + channels
        tl.store(grad_weight + place, of_taps[j], mask=wanted)


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
        tensors, numbers, sizes = _arguments(projected, weight, tail, bounds, num_heads)
        launch = _launch(_FORWARD, sizes, num_heads)
        with torch.cuda.device_of(projected):
            _forward[_grid(numbers[2], num_heads, launch)](*tensors, *outputs, *numbers, **launch)
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
    if bounds is not None:  # sequences without tokens
        outputs[2].zero_()
    tensors, numbers, sizes = _arguments(projected, weight, tail, bounds, num_heads)
    launch = _launch(_BACKWARD, sizes, num_heads)
    upstream = [contiguous(x) for x in (grad_q, grad_k, grad_v)]
    grad_x, grad_weight, grad_tail = outputs
    with torch.cuda.device_of(projected):
        _backward[_grid(numbers[2], num_heads, launch)](
            *upstream, *tensors, grad_x, grad_tail, grad_weight, *numbers, **launch
        )
    return outputs


@torch.library.register_fake("resolvent::queries_keys_values_backward")
def _(grad_q, grad_k, grad_v, projected, weight, tail, bounds, num_heads):
    return _room_for_gradients(projected, weight, tail)


def _room_for_gradients(projected: Tensor, weight: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_queries_keys_values_backward`` returns, yet to be filled."""
    programs = -(-projected.shape[0] * projected.shape[1] // _BACKWARD["TOKENS"])
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
    return tensors, [rows.stride(0), length, batch * length, num_heads], sizes


def _launch(plan, sizes, num_heads):
    fit = max(1, _VALUES * plan["num_warps"] // sizes["BK"])
    return dict(HEADS=min(triton.next_power_of_2(num_heads), fit), **plan, **sizes)


def _grid(total, heads, launch):
    return (triton.cdiv(total, launch["TOKENS"]), 3 * triton.cdiv(heads, launch["HEADS"]))


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
