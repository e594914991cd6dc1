"""Triton kernels of the gated read-out: one pass over memory each, forward and backward.

The operator is ``ops.gated_readout``. A program takes a run of tokens, a few at once, with all of their heads: so it
can add up the gradient of the bias. Runs are short, since many programs hide the latency of memory. What the norm needs
backwards is its result and the inverse rms.

Shapes: T tokens, H heads, V value width, F features, P programs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..library import operator
from ..normalize import RMS_EPS
from .arguments import constexpr
from .launch import contiguous, rows_of
from .queries_keys_values import sigmoid_of

_kernel: Any = triton.jit
_FORWARD = {"TOKENS": 8, "VALUES": 2048, "num_warps": 4}
_BACKWARD = {"TOKENS": 16, "VALUES": 2048, "num_warps": 4}
"""Tokens of a program, values that it holds at once, and its warps."""


class _Variant(NamedTuple):
    """Numbers that a kernel is compiled for.

    Attributes:
        H, V, F: heads, their width, and features.
        BH, BV, BF: the same, padded to powers of two.
        TOKENS: tokens of a program.
        STEP: tokens at once.
        EPS: see ``ops.normalize.RMS_EPS``.
    """

    H: int
    V: int
    F: int
    BH: int
    BV: int
    BF: int
    TOKENS: int
    STEP: int
    EPS: float


@_kernel
def _cells(variant: constexpr):
    """Return the cells of a token's heads, [1, BH, BV], and the mask of those that exist."""
    head, column = tl.arange(0, variant.BH)[None, :, None], tl.arange(0, variant.BV)[None, None, :]
    return head * variant.V + column, (head < variant.H) & (column < variant.V)


@_kernel
def _places(step, total, cells, wanted, variant: constexpr):
    """Return the tokens of a step, and of each the place of its heads, of its features and of its rms, with masks."""
    first = tl.program_id(0).to(tl.int64) * variant.TOKENS + step
    token = first + tl.arange(0, variant.STEP)
    head, feature = tl.arange(0, variant.BH), tl.arange(0, variant.BF)
    there = token < total
    of_heads = token[:, None, None] * (variant.H * variant.V) + cells, there[:, None, None] & wanted
    of_features = token[:, None] * variant.F + feature[None, :], there[:, None] & (feature < variant.F)[None, :]
    of_rms = token[:, None] * variant.H + head[None, :], there[:, None] & (head < variant.H)[None, :]
    return token, of_heads, of_features, of_rms


@_kernel
def _gate_forward(readout, opening, bias, features, normalized, gated, inverse_rms, total, variant: constexpr):
    HV: tl.constexpr = variant.H * variant.V
    dtype: tl.constexpr = readout.dtype.element_ty
    cells, wanted = _cells(variant)
    of_bias = tl.load(bias + cells, mask=wanted, other=0.0).to(tl.float32)
    for step in range(0, variant.TOKENS, variant.STEP):
        token, of_heads, of_features, of_rms = _places(step, total, cells, wanted, variant)
        at, inside = of_heads
        x = tl.load(readout + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 2) / variant.V + variant.EPS)
        y = (x * inverse[:, :, None]).to(dtype)
        tl.store(normalized + at, y, mask=inside)
        tl.store(inverse_rms + of_rms[0], inverse, mask=of_rms[1])
        gate = sigmoid_of(tl.load(opening + at, mask=inside, other=0.0).to(tl.float32) + of_bias, dtype)
        row = gated + token * (HV + variant.F)
        tl.store(row[:, None, None] + cells, (y.to(tl.float32) * gate).to(dtype), mask=inside)
        if variant.F:
            given = tl.load(features + of_features[0], mask=of_features[1], other=0.0)
            to_features = row[:, None] + HV + tl.arange(0, variant.BF)[None, :]
            tl.store(to_features, given.to(dtype), mask=of_features[1])


@_kernel
def _gate_backward(
    grad_normalized, grad_gated, normalized, inverse_rms, opening, bias, grad_readout, grad_opening, grad_bias,
    grad_features, grad_stride, total, variant: constexpr,
):  # fmt: skip
    STEP: tl.constexpr = variant.STEP
    BH: tl.constexpr = variant.BH
    BV: tl.constexpr = variant.BV
    HV: tl.constexpr = variant.H * variant.V
    dtype: tl.constexpr = normalized.dtype.element_ty
    cells, wanted = _cells(variant)
    of_bias = tl.load(bias + cells, mask=wanted, other=0.0).to(tl.float32)
    sums = tl.zeros([STEP, BH, BV], tl.float32)
    for step in range(0, variant.TOKENS, variant.STEP):
        token, of_heads, of_features, of_rms = _places(step, total, cells, wanted, variant)
        at, inside = of_heads
        row = grad_gated + token * grad_stride
        grad = tl.load(row[:, None, None] + cells, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(normalized + at, mask=inside, other=0.0).to(tl.float32)
        gate = sigmoid_of(tl.load(opening + at, mask=inside, other=0.0).to(tl.float32) + of_bias, dtype)
        # 1. The gate.
        through = grad * gate
        of_opening = through * y * (1 - gate)
        tl.store(grad_opening + at, of_opening.to(grad_opening.dtype.element_ty), mask=inside)
        sums += of_opening
        # 2. The norm, y = x / rms.
        if grad_normalized is not None:
            through += tl.load(grad_normalized + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_rms + of_rms[0], mask=of_rms[1], other=0.0)
        along = tl.sum(through * y, 2) / variant.V
        of_readout = (through - y * along[:, :, None]) * inverse[:, :, None]
        tl.store(grad_readout + at, of_readout.to(dtype), mask=inside)
        # 3. The features.
        if variant.F:
            from_features = row[:, None] + HV + tl.arange(0, variant.BF)[None, :]
            given = tl.load(from_features, mask=of_features[1], other=0.0)
            tl.store(grad_features + of_features[0], given.to(grad_features.dtype.element_ty), mask=of_features[1])
    of_bias = tl.expand_dims(tl.sum(sums, 0), 0)
    tl.store(grad_bias + tl.program_id(0).to(tl.int64) * HV + cells, of_bias, mask=wanted)


def gated_readout(readout: Tensor, opening: Tensor, bias: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """See ``ops.gated_readout``."""
    normalized, gated, _ = _gated_readout(readout, opening, bias, features)
    return normalized, gated


def _allocate(readout: Tensor, opening: Tensor, bias: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of ``_gated_readout``."""
    batch, length, heads, width = readout.shape
    return (
        readout.new_empty(batch, length, heads * width),
        readout.new_empty(batch, length, heads * width + features.shape[-1]),
        readout.new_empty(batch, length, heads, dtype=torch.float32),
    )


@operator("gated_readout", _allocate)
def _gated_readout(readout: Tensor, opening: Tensor, bias: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised and the gated read-out, (B, N, HV) and (B, N, HV + F), and the inverse rms (B, N, H)."""
    outputs = _allocate(readout, opening, bias, features)
    if not readout.numel():
        return outputs
    count_run("gated_readout", "triton")
    variant, total, programs = _plan(readout.shape, features, _FORWARD)
    inputs = (x.contiguous() for x in (readout, opening, bias, features))
    with torch.cuda.device_of(readout):
        _gate_forward[(programs,)](*inputs, *outputs, total, variant, num_warps=_FORWARD["num_warps"])
    return outputs


def _allocate_gradients(
    grad_normalized: Tensor | None,
    grad_gated: Tensor,
    normalized: Tensor,
    inverse_rms: Tensor,
    opening: Tensor,
    bias: Tensor,
    features: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of ``_gated_readout_backward``."""
    (batch, length, heads), columns = inverse_rms.shape, normalized.shape[-1]
    return (
        normalized.new_empty(batch, length, heads, columns // heads),
        opening.new_empty(batch, length, columns),
        normalized.new_empty(-(-batch * length // _BACKWARD["TOKENS"]), columns, dtype=torch.float32),
        features.new_empty(features.shape),
    )


@operator("gated_readout_backward", _allocate_gradients)
def _gated_readout_backward(
    grad_normalized: Tensor | None,
    grad_gated: Tensor,
    normalized: Tensor,
    inverse_rms: Tensor,
    opening: Tensor,
    bias: Tensor,
    features: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the read-out, of the opening, of the bias by program, and of the features.

    ``features`` gives the shape and the dtype of the last.
    """
    outputs = _allocate_gradients(grad_normalized, grad_gated, normalized, inverse_rms, opening, bias, features)
    if not normalized.numel():
        return outputs
    rows = rows_of(grad_gated)
    inputs = (contiguous(grad_normalized), rows, *(x.contiguous() for x in (normalized, inverse_rms, opening, bias)))
    variant, total, programs = _plan(outputs[0].shape, features, _BACKWARD)
    with torch.cuda.device_of(normalized):
        _gate_backward[(programs,)](*inputs, *outputs, rows.stride(0), total, variant, num_warps=_BACKWARD["num_warps"])
    return outputs


def _plan(shape: torch.Size, features: Tensor, plan: dict[str, int]) -> tuple[_Variant, int, int]:
    """Return the variant for a read-out of this shape, its tokens, and the programs."""
    batch, length, heads, width = shape
    count = features.shape[-1]
    block_heads, block_width, block_count = (triton.next_power_of_2(max(1, n)) for n in (heads, width, count))
    tokens = plan["TOKENS"]
    step = min(tokens, max(1, plan["VALUES"] // (block_heads * block_width)))
    variant = _Variant(heads, width, count, block_heads, block_width, block_count, tokens, step, RMS_EPS)
    return variant, batch * length, triton.cdiv(batch * length, tokens)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, opening, bias, features = inputs
    normalized, _, inverse_rms = output
    ctx.save_for_backward(normalized, inverse_rms, opening, bias, features)
    ctx.mark_non_differentiable(inverse_rms)
    ctx.set_materialize_grads(False)  # the last block's normalised read-out feeds no block


@torch.autograd.function.once_differentiable
def _gradient(ctx: Any, grad_normalized: Tensor | None, grad_gated: Tensor | None, _: Any) -> tuple[Tensor, ...]:
    normalized, inverse_rms, opening, bias, features = ctx.saved_tensors
    if grad_gated is None:
        grad_gated = normalized.new_zeros(*normalized.shape[:2], normalized.shape[2] + features.shape[2])
    grad_readout, grad_opening, grad_bias, grad_features = _gated_readout_backward(
        grad_normalized, grad_gated, normalized, inverse_rms, opening, bias, features
    )
    return grad_readout, grad_opening, grad_bias.sum(0).to(bias.dtype), grad_features


torch.library.register_autograd("resolvent::gated_readout", _gradient, setup_context=_keep_for_gradient)
