"""Triton kernels of the gated prefix sum (``ops.semiseparable``), forward and backward.

A program walks over one sequence with a few channels, in tiles of tokens: within a tile it scans, from tile to tile it
carries the sum. Backward, the gradient of a term is the sum of the gradients of all sums from the term on: the same
walk from the end. Products have the dtype of the values, at least float32; sums are float64.

Shapes: B batch, N sequence, T = B N tokens, R rank, S sequences (B, or those that ``cu_seqlens`` packs).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..library import operator
from ..packed import count_sequences
from ..precision import wide_dtype
from .launch import contiguous

_kernel: Any = triton.jit
_TOKENS, _CHANNELS = 128, 8
"""Tokens and channels of a tile: a GPU reads at least eight neighbours of float32 at once."""


def gated_prefix_sum(gates: Tensor, values: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute ``ops.gated_prefix_sum``; the state is needed."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(gates.device, torch.int64, non_blocking=True)
    return _prefix_sum(gates, values, state.to(torch.float64), cu_seqlens)


def _allocate(gates: Tensor, values: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Allocate the results of ``_prefix_sum``."""
    return values.new_empty(values.shape, dtype=wide_dtype(values)), state.new_empty(state.shape)


@operator("prefix_sum", _allocate)
def _prefix_sum(gates: Tensor, values: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums (B, N, R) and the last sum of every sequence, float64 (S, R); offsets are on the device."""
    sums, final = _allocate(gates, values, state, cu_seqlens)
    if final.numel():
        count_run("gated_prefix_sum", "triton")
        with torch.cuda.device_of(values):
            _forward[_grid(final)](
                gates.contiguous(),
                values.contiguous(),
                state.contiguous(),
                contiguous(cu_seqlens),
                sums,
                final,
                *values.shape[1:],
                _wide(values),
                _TOKENS,
                _CHANNELS,
            )
    return sums, final


def _allocate_gradients(
    grad_sums: Tensor | None, grad_final: Tensor | None, gates: Tensor, values: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of ``_prefix_sum_backward``."""
    sequences = count_sequences(len(values), cu_seqlens)
    grad_state = values.new_empty(sequences, values.shape[-1], dtype=torch.float64)
    return gates.new_empty(gates.shape), values.new_empty(values.shape), grad_state


@operator("prefix_sum_backward", _allocate_gradients)
def _prefix_sum_backward(
    grad_sums: Tensor | None, grad_final: Tensor | None, gates: Tensor, values: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gates and values (B, N, R) and of the initial state, float64 (S, R)."""
    grad_gates, grad_values, grad_state = _allocate_gradients(grad_sums, grad_final, gates, values, cu_seqlens)
    if grad_state.numel():
        with torch.cuda.device_of(values):
            _backward[_grid(grad_state)](
                contiguous(grad_sums),
                contiguous(grad_final),
                gates.contiguous(),
                values.contiguous(),
                contiguous(cu_seqlens),
                grad_gates,
                grad_values,
                grad_state,
                *values.shape[1:],
                _wide(values),
                _TOKENS,
                _CHANNELS,
            )
    return grad_gates, grad_values, grad_state


def _wide(values: Tensor) -> tl.dtype:
    """Return the dtype of products."""
    return tl.float64 if values.dtype == torch.float64 else tl.float32


def _grid(state: Tensor) -> tuple[int, int]:
    """Return a program for every sequence and a few channels."""
    return len(state), triton.cdiv(state.shape[1], _CHANNELS)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gates, values, _, cu_seqlens = inputs
    ctx.save_for_backward(gates, values, cu_seqlens)
    ctx.set_materialize_grads(False)


@torch.autograd.function.once_differentiable
def _gradient(ctx: Any, grad_sums: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_prefix_sum_backward(grad_sums, grad_final, *ctx.saved_tensors), None


torch.library.register_autograd("resolvent::prefix_sum", _gradient, setup_context=_keep_for_gradient)


@_kernel
def _tokens_of(cu_seqlens, length):
    """Return the sequence of this program, its first token and its last token + 1."""
    sequence = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        first = sequence * length
        end = first + length
    else:
        first, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    return sequence, first, end


@_kernel(do_not_specialize=["length", "rank"])
def _forward(
    gates, values, state, cu_seqlens, sums, final, length, rank,
    WIDE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the sums of a few channels of a sequence."""
    sequence, first, end = _tokens_of(cu_seqlens, length)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    wanted, at_state = channels < rank, sequence * rank + channels
    reached = tl.load(state + at_state, mask=wanted, other=0.0)
    for start in range(first, end, TOKENS):
        rows = start + tl.arange(0, TOKENS)
        cells, inside = rows[:, None] * rank + channels[None, :], (rows < end)[:, None] & wanted[None, :]
        value = tl.load(values + cells, mask=inside, other=0.0).to(WIDE)
        gate = tl.load(gates + cells, mask=inside, other=0.0).to(WIDE)
        terms = (gate * value).to(tl.float64)
        tl.store(sums + cells, (reached[None, :] + tl.cumsum(terms, 0)).to(WIDE), mask=inside)
        reached += tl.sum(terms, 0)
    tl.store(final + at_state, reached, mask=wanted)


@_kernel(do_not_specialize=["length", "rank"])
def _backward(
    grad_sums, grad_final, gates, values, cu_seqlens, grad_gates, grad_values, grad_state, length, rank,
    WIDE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a few channels of a sequence, from its end."""
    sequence, first, end = _tokens_of(cu_seqlens, length)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    wanted, at_state = channels < rank, sequence * rank + channels
    reached = tl.zeros([CHANNELS], tl.float64)
    if grad_final is not None:
        reached += tl.load(grad_final + at_state, mask=wanted, other=0.0)
    for back in range(0, end - first, TOKENS):
        rows = end - back - TOKENS + tl.arange(0, TOKENS)
        cells, inside = rows[:, None] * rank + channels[None, :], (rows >= first)[:, None] & wanted[None, :]
        value = tl.load(values + cells, mask=inside, other=0.0).to(WIDE)
        gate = tl.load(gates + cells, mask=inside, other=0.0).to(WIDE)
        grad_terms = tl.zeros([TOKENS, CHANNELS], tl.float64) + reached[None, :]
        if grad_sums is not None:
            upstream = tl.load(grad_sums + cells, mask=inside, other=0.0).to(tl.float64)
            grad_terms += tl.cumsum(upstream, 0, reverse=True)
            reached += tl.sum(upstream, 0)
        grad_gate, grad_value = grad_terms.to(WIDE) * value, grad_terms.to(WIDE) * gate
        tl.store(grad_gates + cells, grad_gate.to(grad_gates.dtype.element_ty), mask=inside)
        tl.store(grad_values + cells, grad_value.to(grad_values.dtype.element_ty), mask=inside)
    tl.store(grad_state + at_state, reached, mask=wanted)
