"""Triton kernels of the short convolution before the memory, with SiLU and L2 normalisation.

The operator is ``ops.queries_keys_values``. Everything between the projection and the memory is one pass over memory,
and so is its gradient, which keeps the projection alone. Columns of the projection behind those of the values are for
others: the operator hands them out, so that it can write the gradient of the whole projection to one place.

A program takes a run of tokens of some heads' queries, keys or values, token by token: the rows under the convolution
stay in registers, so that each is loaded once. Where a run or a sequence begins, they are loaded again.

Shapes: T tokens, H heads, K head width, C = 3HK channels, R further columns, W convolution width, S sequences.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..library import operator
from ..packed import sequence_numbers
from .arguments import constexpr
from .consolidation import sigmoid
from .launch import contiguous, rows_of

_kernel: Any = triton.jit


class _Inputs(NamedTuple):
    """Projections (T, C + R), taps (W, C), tails (S, W - 1, C), and the bounds of packed sequences; or gradients."""

    projected: Tensor
    weight: Tensor
    tail: Tensor
    bounds: Tensor | None = None


class _Heads(NamedTuple):
    """Queries, keys and values (T, HK), or their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor


class _Rows(NamedTuple):
    """Strides of the rows of projections and of their gradients, tokens of a sequence, and of all of them."""

    stride: int
    grad_stride: int
    length: int
    total: int


class _Variant(NamedTuple):
    """Numbers that a kernel is compiled for.

    Attributes:
        K: head width.
        BK: head width padded to a power of two.
        W: taps.
        HEADS: heads of a program.
        TOKENS: tokens of a run.
        STAGES: rows that are loaded ahead.
        UNROLL: steps that are unrolled.
    """

    K: int
    BK: int
    W: int
    HEADS: int
    TOKENS: int
    STAGES: int
    UNROLL: int = 1


TINY = tl.constexpr(1e-12)  # that of ``ops.normalize.unit_length``
_CHANNELS = 256
"""Channels of a warp, for up to 4 taps."""
_FORWARD = dict(TOKENS=32, STAGES=3, UNROLL=4)
_BACKWARD = dict(TOKENS=64, STAGES=4)
_BACKWARD_REGISTERS = 168
"""Most registers of a thread, so that more warps fit."""


@_kernel
def _sequence(token, bounds, rows):
    """Return the sequence of a token, its first token and its last token + 1."""
    if bounds is not None:
        sequence = tl.load(bounds + token).to(tl.int32)
        start = tl.load(bounds + rows.total + sequence).to(tl.int32)
        end = tl.load(bounds + rows.total + sequence + 1).to(tl.int32)
    else:
        sequence = token // rows.length
        start = sequence * rows.length
        end = start + rows.length
    return sequence, start, end


@_kernel
def _of_role(role, heads):
    """Choose one of three pointers."""
    chosen = heads.q
    if role == 1:
        chosen = heads.k
    elif role == 2:
        chosen = heads.v
    return chosen


@_kernel
def _heads(heads, K: tl.constexpr, BK: tl.constexpr, HEADS: tl.constexpr):
    """Return the role of a program's heads, their columns in a row of that role, and the mask of those that exist."""
    groups = (heads + HEADS - 1) // HEADS
    role, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    head, column = group * HEADS + tl.arange(0, HEADS), tl.arange(0, BK)
    return role, head[:, None] * K + column[None, :], (head < heads)[:, None] & (column < K)[None, :]


# Rows are tuples of W tiles [HEADS, BK]. Triton has no starred tuples.


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
def _before(x, stride, tail, C, index, wanted, W: tl.constexpr):
    """Load the W - 1 projections before the one at ``x``, the latest first, and zeros.

    ``index`` is that of ``x`` in its sequence; the projections before the sequence are in the tail.
    """
    rows = ()
    for j in tl.static_range(1, W):
        if index >= j:
            row = _loaded(x - j * stride, wanted)
        else:
            row = _loaded(tail + (W - 1 + index - j) * C, wanted)
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
def sigmoid_of(x, dtype: tl.constexpr):
    """Return the sigmoid of float32: in 5 instructions instead of 12, without the last bit, for results of 16 bits."""
    if dtype == tl.float32:
        gate = tl.sigmoid(x)
    else:
        gate = sigmoid(x)
    return gate


@_kernel
def _forward(inputs, outputs, layout, heads, variant: constexpr):
    K: tl.constexpr = variant.K
    W: tl.constexpr = variant.W
    UNROLL: tl.constexpr = variant.UNROLL
    role, columns, wanted = _heads(heads, K, variant.BK, variant.HEADS)
    HK, C, channels = heads * K, 3 * heads * K, role * heads * K + columns
    first = tl.program_id(0) * variant.TOKENS
    at_x = inputs.projected + first.to(tl.int64) * layout.stride + channels
    at_out = _of_role(role, outputs) + first.to(tl.int64) * HK + columns
    taps, rows = _taps(inputs.weight + channels, wanted, C, W), _zeros(variant.HEADS, variant.BK, W)
    end = first  # of the sequence before
    steps = tl.minimum(variant.TOKENS, layout.total - first)
    for step in tl.range(steps, num_stages=variant.STAGES, loop_unroll_factor=UNROLL):
        token, row = first + step, _loaded(at_x, wanted)
        if token == end:
            sequence, start, end = _sequence(token, inputs.bounds, layout)
            at_tail = inputs.tail + sequence.to(tl.int64) * (W - 1) * C + channels
            rows = _before(at_x, layout.stride, at_tail, C, token - start, wanted, W)
        rows = (row,) + rows[: W - 1]  # noqa: RUF005
        given = _convolved(rows, taps, W)
        given *= sigmoid_of(given, inputs.projected.dtype.element_ty)
        if role < 2:
            given *= tl.rsqrt(tl.sum(given * given, 1) + K * TINY)[:, None]
        tl.store(at_out, given.to(outputs.q.dtype.element_ty), mask=wanted)
        at_x += layout.stride
        at_out += HK


@_kernel
def _settle(row, token, at_x, at_tail, start, first, last, wanted, C, W: tl.constexpr):
    """Store the gradient of a token's projection, or of a tail before ``start``, if it belongs to this program."""
    if token >= start:
        if (token >= first) & (token < last):
            tl.store(at_x, row.to(at_x.dtype.element_ty), mask=wanted)
    elif (start >= first) & (start < last):
        at_tail += (W - 1 + token - start) * C
        tl.store(at_tail, row.to(at_tail.dtype.element_ty), mask=wanted)


@_kernel
def _settle_all(rows, token, at_x, stride, at_tail, start, first, last, wanted, C, W: tl.constexpr):
    """Store the gradients of the W - 1 tokens before this one, when no other token adds to them."""
    for j in tl.static_range(1, W):
        _settle(rows[j - 1], token - j, at_x - j * stride, at_tail, start, first, last, wanted, C, W)


@_kernel
def _backward(upstream, inputs, grads, layout, heads, variant: constexpr):
    """Compute gradients of a run and W - 1 tokens beyond it, whose outputs depend on projections of the run."""
    K: tl.constexpr = variant.K
    BK: tl.constexpr = variant.BK
    W: tl.constexpr = variant.W
    HEADS: tl.constexpr = variant.HEADS
    TOKENS: tl.constexpr = variant.TOKENS
    stride, grad_stride, total = layout.stride, layout.grad_stride, layout.total
    tail, grad_tail = inputs.tail, grads.tail
    role, columns, wanted = _heads(heads, K, BK, HEADS)
    HK, C, channels = heads * K, 3 * heads * K, role * heads * K + columns
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, total)
    steps = tl.minimum(last + W - 1, total) - first
    at_x = inputs.projected + first.to(tl.int64) * stride + channels
    at_upstream = _of_role(role, upstream) + first.to(tl.int64) * HK + columns
    at_grad = grads.projected + first.to(tl.int64) * grad_stride + channels
    taps, rows = _taps(inputs.weight + channels, wanted, C, W), _zeros(HEADS, BK, W)
    of_rows, of_taps = _zeros(HEADS, BK, W), _zeros(HEADS, BK, W)
    # The sequence before, whose gradients belong to another program: its index among the tails does not matter.
    start, end, of_tail = first - W, first, first.to(tl.int64)
    for step in tl.range(steps, num_stages=variant.STAGES):
        token, row, grad = first + step, _loaded(at_x, wanted), _loaded(at_upstream, wanted)
        if token == end:
            at_tail = grad_tail + of_tail + channels
            _settle_all(of_rows, token, at_grad, grad_stride, at_tail, start, first, last, wanted, C, W)
            sequence, start, end = _sequence(token, inputs.bounds, layout)
            of_tail = sequence.to(tl.int64) * (W - 1) * C
            rows = _before(at_x, stride, tail + of_tail + channels, C, token - start, wanted, W)
            of_rows = _zeros(HEADS, BK, W)
        rows = (row,) + rows[: W - 1]  # noqa: RUF005
        given = _convolved(rows, taps, W)
        gate = sigmoid_of(given, inputs.projected.dtype.element_ty)
        activated = given * gate
        if role < 2:
            inverse = tl.rsqrt(tl.sum(activated * activated, 1) + K * TINY)
            along = tl.sum(activated * grad, 1) * inverse * inverse
            grad = (grad - activated * along[:, None]) * inverse[:, None]
        grad *= gate + activated * (1 - gate)
        if token < last:
            of_taps = _with_product(of_taps, rows, grad, W)
        of_rows = _with_product(_zeros(HEADS, BK, 1) + of_rows[: W - 1], taps, grad, W)
        oldest, at_tail = token - (W - 1), grad_tail + of_tail + channels
        at_oldest = at_grad - (W - 1) * grad_stride
        _settle(of_rows[W - 1], oldest, at_oldest, at_tail, start, first, last, wanted, C, W)
        at_x += stride
        at_upstream += HK
        at_grad += grad_stride
    at_tail = grad_tail + of_tail + channels
    _settle_all(of_rows, first + steps, at_grad, grad_stride, at_tail, start, first, last, wanted, C, W)
    for j in tl.static_range(W):
        at_weight = grads.weight + (tl.program_id(0).to(tl.int64) * W + j) * C + channels
        tl.store(at_weight, of_taps[j], mask=wanted)


def queries_keys_values(
    projected: Tensor, weight: Tensor, tail: Tensor, num_heads: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each (B, N, HK), and the other columns; see ``ops.queries_keys_values``."""
    if cu_seqlens is not None:
        # One table, in which a program finds a token's sequence and its bounds without a search.
        bounds = cu_seqlens.to(projected.device, torch.int64, non_blocking=True)
        cu_seqlens = torch.cat([sequence_numbers(bounds, projected.shape[1]), bounds])
    return _queries_keys_values(projected, weight, tail, cu_seqlens, num_heads)


def _allocate(
    projected: Tensor, weight: Tensor, tail: Tensor, bounds: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of ``_queries_keys_values``."""
    (*rows, columns), channels = projected.shape, weight.shape[1]
    q, k, v = (projected.new_empty(*rows, channels // 3) for _ in range(3))
    return q, k, v, projected.new_empty(*rows, columns - channels)


@operator("queries_keys_values", _allocate)
def _queries_keys_values(
    projected: Tensor, weight: Tensor, tail: Tensor, bounds: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each (B, N, HK), and the other columns, (B, N, R).

    ``bounds`` are the sequence of every token, followed by the offsets of all packed sequences, int64 on the device.
    """
    outputs = _allocate(projected, weight, tail, bounds, num_heads)
    *heads, rest = outputs
    rest.copy_(projected[..., weight.shape[1] :])
    if projected.numel():
        inputs, rows, variant, grid, warps = _arguments(projected, weight, tail, bounds, num_heads, _FORWARD)
        count_run("queries_keys_values", "triton")
        with torch.cuda.device_of(projected):
            _forward[grid](inputs, _Heads(*heads), rows, num_heads, variant, num_warps=warps)
    return outputs


def _allocate_gradients(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_rest: Tensor,
    projected: Tensor,
    weight: Tensor,
    tail: Tensor,
    bounds: Tensor | None,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of ``_queries_keys_values_backward``."""
    programs = -(-projected.shape[0] * projected.shape[1] // _BACKWARD["TOKENS"])
    return (
        projected.new_empty(projected.shape),
        weight.new_empty(programs, *weight.shape, dtype=torch.float32),
        tail.new_empty(tail.shape),
    )


@operator("queries_keys_values_backward", _allocate_gradients)
def _queries_keys_values_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_rest: Tensor,
    projected: Tensor,
    weight: Tensor,
    tail: Tensor,
    bounds: Tensor | None,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``projected``, of the weight by program, and of the tail."""
    outputs = _allocate_gradients(grad_q, grad_k, grad_v, grad_rest, projected, weight, tail, bounds, num_heads)
    if not projected.numel():
        torch._foreach_zero_(outputs)
        return outputs
    grads = _Inputs(*outputs)
    grads.projected[..., weight.shape[1] :] = grad_rest
    if bounds is not None:
        grads.tail.zero_()  # sequences without a token have a tail
    inputs, rows, variant, grid, warps = _arguments(projected, weight, tail, bounds, num_heads, _BACKWARD)
    upstream = _Heads(grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous())
    options = dict(num_warps=warps, maxnreg=_BACKWARD_REGISTERS)
    with torch.cuda.device_of(projected):
        _backward[grid](upstream, inputs, grads, rows, num_heads, variant, **options)
    return outputs


def _arguments(
    projected: Tensor, weight: Tensor, tail: Tensor, bounds: Tensor | None, num_heads: int, plan: dict[str, int]
) -> tuple[_Inputs, _Rows, _Variant, tuple[int, int], int]:
    """Return what both kernels take, the grid and the warps of a program."""
    length, columns = projected.shape[1:]
    rows = rows_of(projected)
    width, taps = weight.shape[1] // (3 * num_heads), len(weight)
    block = triton.next_power_of_2(width)
    values = _CHANNELS * 4 // max(4, triton.next_power_of_2(taps))  # a thread keeps rows of every tap
    heads = min(triton.next_power_of_2(num_heads), max(1, values // block))
    grid = (triton.cdiv(len(rows), plan["TOKENS"]), 3 * triton.cdiv(num_heads, heads))
    inputs = _Inputs(rows, weight.contiguous(), tail.contiguous(), contiguous(bounds))
    variant = _Variant(width, block, taps, heads, **plan)
    return inputs, _Rows(rows.stride(0), columns, length, len(rows)), variant, grid, max(1, block // values)


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
