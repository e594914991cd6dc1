"""Triton kernels of the short convolution before the memory, with SiLU and unit length (``ops.queries_keys_values``).

Everything between the projection and the memory is one pass over memory, and so is its gradient, which keeps the
projection alone.

A program takes a run of tokens of some heads' queries, keys or values, one token after the other: the rows that a
convolution lets meet stay in registers, so that each is loaded once. Where a run or a sequence begins they are read
anew. Shapes: T tokens, H heads, K head width, C = 3HK channels, W convolution width, S sequences.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..library import operator
from ..packed import sequence_numbers
from .consolidation import sigmoid
from .launch import contiguous

_kernel: Any = triton.jit
TINY = tl.constexpr(1e-12)  # that of ``ops.normalize.unit_length``
_FORWARD = dict(VALUES=256, TOKENS=32, STAGES=3, UNROLL=4)
_BACKWARD = dict(VALUES=256, TOKENS=64, STAGES=4, maxnreg=168)
"""Channels of a warp (of up to 4 taps), tokens of a run, rows that are on their way at a time, steps that are written
out one after the other, and registers of a thread at most, so that there is room for more warps."""


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
def _heads(heads, K: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr):
    """Role of a program's heads, the columns they have in a row of that role and which of those exist, [HEADS, BK]."""
    groups = (heads + HEADS - 1) // HEADS
    role, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    head, column = group * HEADS + tl.arange(0, HEADS), tl.arange(0, BK)
    return role, head[:, None] * K + column[None, :], (head < heads)[:, None] & (column < K)[None, :]


# Rows are tuples of tiles [HEADS, BK], W of them unless it says otherwise. Triton has no starred tuples.


@_kernel
def _zeros(HEADS: tl.constexpr, BK: tl.constexpr, W: tl.constexpr):
    rows = ()
    for _ in tl.static_range(W):
        rows = rows + (tl.zeros([HEADS, BK], tl.float32),)  # noqa: RUF005
    return rows


@_kernel
def _loaded(x, wanted):
    return tl.load(x, mask=wanted, other=0.0).to(tl.float32)


@_kernel
def _taps(weight, wanted, C, W: tl.constexpr):
    rows = ()
    for j in tl.static_range(W):
        rows = rows + (_loaded(weight + j * C, wanted),)  # noqa: RUF005
    return rows


@_kernel
def _before(x, stride, tail, C, place, wanted, W: tl.constexpr):
    """The W - 1 projections before the one at ``x``, the latest first, and zeros.

    ``place`` says how many of its sequence precede it; what precedes those is in the tail.
    """
    rows = ()
    for j in tl.static_range(1, W):
        if place >= j:
            row = _loaded(x - j * stride, wanted)
        else:
            row = _loaded(tail + (W - 1 + place - j) * C, wanted)
        rows = rows + (row,)  # noqa: RUF005
    return rows + _zeros(wanted.shape[0], wanted.shape[1], 1)


@_kernel
def _convolved(rows, taps, W: tl.constexpr):
    total = rows[0] * taps[0]
    for j in tl.static_range(1, W):
        total += rows[j] * taps[j]
    return total


@_kernel
def _with_product(rows, others, factor, W: tl.constexpr):
    sums = ()
    for j in tl.static_range(W):
        sums = sums + (rows[j] + others[j] * factor,)  # noqa: RUF005
    return sums


@_kernel
def _sigmoid(x, dtype: tl.constexpr):
    """Of float32; in 5 instructions instead of 12, not to its last bit, where results are stored in 16 bits."""
    if dtype == tl.float32:
        gate = tl.sigmoid(x)
    else:
        gate = sigmoid(x)
    return gate


@_kernel
def _forward(
    x, weight, tail, bounds, q, k, v, stride, length, total, heads,
    PACKED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    role, columns, wanted = _heads(heads, K, BK, HEADS)
    HK, C, channels = heads * K, 3 * heads * K, role * heads * K + columns
    first = tl.program_id(0) * TOKENS
    at_x = x + first.to(tl.int64) * stride + channels
    at_out = _of_role(role, q, k, v) + first.to(tl.int64) * HK + columns
    taps, rows = _taps(weight + channels, wanted, C, W), _zeros(HEADS, BK, W)
    end = first  # of the sequence before
    for step in tl.range(tl.minimum(TOKENS, total - first), num_stages=STAGES, loop_unroll_factor=UNROLL):
        token, row = first + step, _loaded(at_x, wanted)
        if token == end:
            sequence, start, end = _sequence(token, bounds, length, total, PACKED)
            at_tail = tail + sequence.to(tl.int64) * (W - 1) * C + channels
            rows = _before(at_x, stride, at_tail, C, token - start, wanted, W)
        rows = (row,) + rows[: W - 1]  # noqa: RUF005
        given = _convolved(rows, taps, W)
        given *= _sigmoid(given, x.dtype.element_ty)
        if role < 2:
            given *= tl.rsqrt(tl.sum(given * given, 1) + K * TINY)[:, None]
        tl.store(at_out, given.to(q.dtype.element_ty), mask=wanted)
        at_x += stride
        at_out += HK


@_kernel
def _settle(row, token, at_x, at_tail, start, first, last, wanted, C, W: tl.constexpr):
    """Store the gradient of a token's projection, of one of the tail before ``start``, if it is this program's."""
    if token >= start:
        if (token >= first) & (token < last):
            tl.store(at_x, row.to(at_x.dtype.element_ty), mask=wanted)
    elif (start >= first) & (start < last):
        at_tail += (W - 1 + token - start) * C
        tl.store(at_tail, row.to(at_tail.dtype.element_ty), mask=wanted)


@_kernel
def _settle_all(rows, token, at_x, at_tail, start, first, last, wanted, C, W: tl.constexpr):
    """What W - 1 tokens before this one have got, when no other comes."""
    for j in tl.static_range(1, W):
        _settle(rows[j - 1], token - j, at_x - j * C, at_tail, start, first, last, wanted, C, W)


@_kernel
def _backward(
    grad_q, grad_k, grad_v, x, weight, tail, bounds, grad_x, grad_tail, grad_weight, stride, length, total, heads,
    PACKED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walks W - 1 tokens beyond its run, because a token's projection meets those after it."""
    role, columns, wanted = _heads(heads, K, BK, HEADS)
    HK, C, channels = heads * K, 3 * heads * K, role * heads * K + columns
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, total)
    steps = tl.minimum(last + W - 1, total) - first
    at_x = x + first.to(tl.int64) * stride + channels
    at_upstream = _of_role(role, grad_q, grad_k, grad_v) + first.to(tl.int64) * HK + columns
    at_grad = grad_x + first.to(tl.int64) * C + channels
    taps, rows = _taps(weight + channels, wanted, C, W), _zeros(HEADS, BK, W)
    of_rows, of_taps = _zeros(HEADS, BK, W), _zeros(HEADS, BK, W)
    # Of a sequence before, whose gradients are another program's: its place among the tails does not matter.
    start, end, of_tail = first - W, first, first.to(tl.int64)
    for step in tl.range(steps, num_stages=STAGES):
        token, row, grad = first + step, _loaded(at_x, wanted), _loaded(at_upstream, wanted)
        if token == end:
            _settle_all(of_rows, token, at_grad, grad_tail + of_tail + channels, start, first, last, wanted, C, W)
            sequence, start, end = _sequence(token, bounds, length, total, PACKED)
            of_tail = sequence.to(tl.int64) * (W - 1) * C
            rows = _before(at_x, stride, tail + of_tail + channels, C, token - start, wanted, W)
            of_rows = _zeros(HEADS, BK, W)
        rows = (row,) + rows[: W - 1]  # noqa: RUF005
        given = _convolved(rows, taps, W)
        gate = _sigmoid(given, x.dtype.element_ty)
        activated = given * gate
        if role < 2:
            inverse = tl.rsqrt(tl.sum(activated * activated, 1) + K * TINY)
            along = tl.sum(activated * grad, 1) * inverse * inverse
            grad = (grad - activated * along[:, None]) * inverse[:, None]
        grad *= gate + activated * (1 - gate)
        if token < last:
            of_taps = _with_product(of_taps, rows, grad, W)
        of_rows = _with_product(_zeros(HEADS, BK, 1) + of_rows[: W - 1], taps, grad, W)
        place, at_tail = token - (W - 1), grad_tail + of_tail + channels
        _settle(of_rows[W - 1], place, at_grad - (W - 1) * C, at_tail, start, first, last, wanted, C, W)
        at_x += stride
        at_upstream += HK
        at_grad += C
    _settle_all(of_rows, first + steps, at_grad, grad_tail + of_tail + channels, start, first, last, wanted, C, W)
    for j in tl.static_range(W):
        at_weight = grad_weight + (tl.program_id(0).to(tl.int64) * W + j) * C + channels
        tl.store(at_weight, of_taps[j], mask=wanted)


def queries_keys_values(
    projected: Tensor, weight: Tensor, tail: Tensor, num_heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        # One table, so that a program finds a token's sequence and its bounds without a search.
        bounds = cu_seqlens.to(projected.device, torch.int64, non_blocking=True)
        cu_seqlens = torch.cat([sequence_numbers(bounds, projected.shape[1]), bounds])
    return _queries_keys_values(projected, weight, tail, cu_seqlens, num_heads)


@operator("queries_keys_values")
def _queries_keys_values(
    projected: Tensor, weight: Tensor, tail: Tensor, bounds: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, N, HK).

    ``bounds`` tells packed sequences apart: the sequence of every token, followed by the offsets of all, int64 on the
    device.
    """
    outputs = _room(projected)
    if projected.numel():
        tensors, numbers, grid, sizes = _arguments(projected, weight, tail, bounds, num_heads, _FORWARD)
        count_run("queries_keys_values", "triton")
        with torch.cuda.device_of(projected):
            _forward[grid](*tensors, *outputs, *numbers, **sizes)
    return outputs


@torch.library.register_fake("resolvent::queries_keys_values")
def _(projected, weight, tail, bounds, num_heads):
    return _room(projected)


def _room(projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``_queries_keys_values`` returns, yet to be filled."""
    *rows, channels = projected.shape
    q, k, v = (projected.new_empty(*rows, channels // 3) for _ in range(3))
    return q, k, v


@operator("queries_keys_values_backward")
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
    grad_x, grad_weight, grad_tail = outputs
    if bounds is not None:
        grad_tail.zero_()  # sequences without a token have a tail
    tensors, numbers, grid, sizes = _arguments(projected, weight, tail, bounds, num_heads, _BACKWARD)
    upstream = [contiguous(x) for x in (grad_q, grad_k, grad_v)]
    with torch.cuda.device_of(projected):
        _backward[grid](*upstream, *tensors, grad_x, grad_tail, grad_weight, *numbers, **sizes)
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
    projected: Tensor, weight: Tensor, tail: Tensor, bounds: Tensor | None, num_heads: int, plan: dict[str, int]
) -> tuple[list[Any], list[int], tuple[int, int], dict[str, Any]]:
    """What the kernels take: tensors; stride of a row, tokens of a sequence and of all, heads; grid; options."""
    length, channels = projected.shape[1:]
    rows = projected.flatten(0, 1)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    width, taps = channels // (3 * num_heads), len(weight)
    options = dict(plan, PACKED=bounds is not None, K=width, BK=triton.next_power_of_2(width), W=taps)
    values = options.pop("VALUES") * 4 // max(4, triton.next_power_of_2(taps))  # of every tap a thread keeps rows
    options["HEADS"] = min(triton.next_power_of_2(num_heads), max(1, values // options["BK"]))
    options["num_warps"] = max(1, options["BK"] // values)
    grid = (triton.cdiv(len(rows), plan["TOKENS"]), 3 * triton.cdiv(num_heads, options["HEADS"]))
    tensors = [rows, *map(contiguous, (weight, tail, bounds))]
    return tensors, [rows.stride(0), length, len(rows), num_heads], grid, options


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
