"""Triton kernel that cuts the projections of the tokens into heads, and rotates queries and keys; and its gradient.

A program takes some heads of one token: both channels of all their pairs. The gradient is the same in the other
direction, by the opposite angles.

Shapes: T tokens, R rows of the rotation, H heads of queries, J heads of keys and values, K head width.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..library import operator
from ..memory_rotation import Rotation
from .arguments import constexpr
from .launch import rows_of

_kernel: Any = triton.jit


class _Heads(NamedTuple):
    """Queries (T, H, K), keys (T, J, K) and values (T, J, K), or their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor


class _Table(NamedTuple):
    """Cosines and sines of the rotation (R, K), those of token t in row ``t mod R``."""

    cos: Tensor
    sin: Tensor
    rows: int


class _Sizes(NamedTuple):
    """Numbers that the kernel is compiled for: heads, width, heads of a program, and pairs padded to a power of 2."""

    H: int
    J: int
    K: int
    HEADS: int
    PAIRS: int


_PAIRS_OF_PROGRAM = 1024


@_kernel
def _places(heads, token, head, pair, H: tl.constexpr, J: tl.constexpr, K: tl.constexpr):
    """Return the places of the first channels among queries, keys and values, and the masks of those that exist."""
    inside = pair < K // 2
    q = heads.q + (token * H + head) * K + pair
    k = heads.k + (token * J + head - H) * K + pair
    v = heads.v + (token * J + head - H - J) * K + pair
    is_key, is_value = (head >= H) & (head < H + J), (head >= H + J) & (head < H + 2 * J)
    return q, k, v, inside & (head < H), inside & is_key, inside & is_value


@_kernel
def _of_any(q, k, v, is_query, is_key, is_value):
    x = tl.load(q, mask=is_query, other=0.0).to(tl.float32)
    x += tl.load(k, mask=is_key, other=0.0).to(tl.float32)
    return x + tl.load(v, mask=is_value, other=0.0).to(tl.float32)


@_kernel
def _rotate_heads(projected, stride, table, heads, sizes: constexpr, BACKWARD: tl.constexpr):
    K: tl.constexpr = sizes.K
    HEADS: tl.constexpr = sizes.HEADS
    PAIRS: tl.constexpr = sizes.PAIRS
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    q, k, v, is_query, is_key, is_value = _places(heads, token, head, pair, sizes.H, sizes.J, K)
    wanted, turns = is_query | is_key | is_value, is_query | is_key
    at = projected + token * stride + head * K + pair
    # 1. Load both channels of the pairs.
    if BACKWARD:
        first = _of_any(q, k, v, is_query, is_key, is_value)
        second = _of_any(q + K // 2, k + K // 2, v + K // 2, is_query, is_key, is_value)
    else:
        first = tl.load(at, mask=wanted, other=0.0).to(tl.float32)
        second = tl.load(at + K // 2, mask=wanted, other=0.0).to(tl.float32)
    # 2. Turn those of queries and keys.
    row = (token % table.rows) * K + pair
    cos = tl.load(table.cos + row + 0 * head, mask=turns, other=1.0)
    sin = tl.load(table.sin + row + K // 2 + 0 * head, mask=turns, other=0.0)
    if BACKWARD:
        sin = -sin
    first, second = first * cos - second * sin, second * cos + first * sin
    # 3. Store them.
    if BACKWARD:
        tl.store(at, first.to(projected.dtype.element_ty), mask=wanted)
        tl.store(at + K // 2, second.to(projected.dtype.element_ty), mask=wanted)
    else:
        first, second = first.to(heads.q.dtype.element_ty), second.to(heads.q.dtype.element_ty)
        tl.store(q, first, mask=is_query)
        tl.store(q + K // 2, second, mask=is_query)
        tl.store(k, first, mask=is_key)
        tl.store(k + K // 2, second, mask=is_key)
        tl.store(v, first, mask=is_value)
        tl.store(v + K // 2, second, mask=is_value)


def rotated_heads(
    projected: Tensor, rotation: Rotation, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values; arguments as in ``ops.rotated_heads``."""
    return _rotated_heads(projected, rotation.cos, rotation.sin, num_heads, num_kv_heads)


def _allocate(
    projected: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of ``_rotated_heads``."""
    batch, length, channels = projected.shape
    width = channels // (num_heads + 2 * num_kv_heads)
    q, k, v = (projected.new_empty(batch, length, n, width) for n in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v


@operator("rotated_heads", _allocate)
def _rotated_heads(
    projected: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, N, H, K), keys and values (B, N, J, K)."""
    outputs = _allocate(projected, cos, sin, num_heads, num_kv_heads)
    count_run("rotated_heads", "triton")
    _launch(projected, _Heads(*outputs), cos, sin, backward=False)
    return outputs


def _allocate_gradient(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Allocate the result of ``_rotated_heads_backward``."""
    channels = (grad_q.shape[2] + 2 * grad_k.shape[2]) * grad_q.shape[3]
    return grad_q.new_empty(*grad_q.shape[:2], channels)


@operator("rotated_heads_backward", _allocate_gradient)
def _rotated_heads_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of ``projected``."""
    grad = _allocate_gradient(grad_q, grad_k, grad_v, cos, sin)
    _launch(grad, _Heads(grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()), cos, sin, backward=True)
    return grad


def _launch(projected: Tensor, heads: _Heads, cos: Tensor, sin: Tensor, *, backward: bool) -> None:
    """Launch the kernel, from the projections to the heads or, with ``backward``, from the heads to the projections."""
    if not projected.numel():
        return
    rows = rows_of(projected)
    count, groups, width = heads.q.shape[2], heads.k.shape[2], heads.q.shape[3]
    pairs = triton.next_power_of_2(width // 2)
    of_program = min(triton.next_power_of_2(count + 2 * groups), max(1, _PAIRS_OF_PROGRAM // pairs))
    table = _Table(cos.flatten(0, 2).contiguous(), sin.flatten(0, 2).contiguous(), cos.numel() // width)
    sizes = _Sizes(count, groups, width, of_program, pairs)
    grid = (len(rows), triton.cdiv(count + 2 * groups, of_program))
    with torch.cuda.device_of(projected):
        _rotate_heads[grid](rows, rows.stride(0), table, heads, sizes, BACKWARD=backward, num_warps=4)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:3])


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return _rotated_heads_backward(*grads, *ctx.saved_tensors), None, None, None, None


torch.library.register_autograd("resolvent::rotated_heads", _backward, setup_context=_keep_for_gradient)
