"""One token of the dissipative Hebbian memory, for generation: ``ops.hebbian.dissipative_memory_step`` in Triton.

Shapes: B sequences, H heads, K key width, V value width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..library import operator
from .consolidation import consolidate, constants_of
from .hebbian_kernels import VARYING, cells_of, load_state, resonance_of, sizes_of, strength_of
from .launch import contiguous

_kernel: Any = triton.jit


@_kernel
def advance(
    query, key, value, decay, state, wrote, forgot, memory, writes, forgetting, boundary, force, basis, sharpness, bias,
    row, head, square, in_square, threshold, temperature, gamma_boost, eta_boost, energy,
    K, V, BK: tl.constexpr, SNR: tl.constexpr, RESONANCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A memory learns ``key`` (with its rate η) and ``value``, answers ``query``, and is stored."""
    square += row * K * V
    kept, written = tl.exp(-decay), key[:, None] * value[None, :]
    state = state * kept + written
    answer = tl.sum(state * query[:, None], 0)
    if SNR or RESONANCE:
        wrote, forgot = wrote * kept + written, forgot + decay
        if boundary:
            keys = tl.arange(0, BK)
            modes, steepness, offset = resonance_of(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)
            state = consolidate(
                state, wrote, forgot, force, modes, steepness, offset, threshold, temperature, gamma_boost, eta_boost,
                energy, K, V, SNR, RESONANCE,
            )  # fmt: skip
            wrote = tl.zeros_like(wrote)
            forgot = 0.0
        tl.store(writes + square, wrote, mask=in_square)
        tl.store(forgetting + row, forgot)
    tl.store(memory + square, state, mask=in_square)
    return answer


@_kernel(do_not_specialize=VARYING)
def _step(
    q, k, v, decay, eta, memory, writes, forgetting, position, strength, basis, sharpness, bias,
    readout, new_memory, new_writes, new_forgetting,
    q_row, q_head, k_row, k_head, v_row, v_head, decay_row, decay_head,
    threshold, temperature, gamma_boost, eta_boost, energy, interval, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SNR: tl.constexpr, RESONANCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token of a head of a sequence."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    row = sequence * heads + head
    query = tl.load(q + sequence * q_row + head * q_head + keys, mask=keys < K, other=0.0).to(tl.float32)
    key = tl.load(k + sequence * k_row + head * k_head + keys, mask=keys < K, other=0.0).to(tl.float32)
    value = tl.load(v + sequence * v_row + head * v_head + values, mask=values < V, other=0.0).to(tl.float32)
    boundary = (tl.load(position + sequence) + 1) % tl.maximum(interval, 1) == 0
    forgets = tl.load(decay + sequence * decay_row + head * decay_head).to(tl.float32)
    square, in_square = cells_of(keys, values, K, V)
    state, wrote, forgot = load_state(memory, writes, forgetting, row, square, in_square, K, V, SNR or RESONANCE)
    answer = advance(
        query, key * tl.load(eta + head), value, forgets, state, wrote, forgot, new_memory, new_writes, new_forgetting,
        boundary, strength_of(strength, head), basis, sharpness, bias, row, head, square, in_square, threshold,
        temperature, gamma_boost, eta_boost, energy, K, V, BK, SNR, RESONANCE, HALF,
    )  # fmt: skip
    tl.store(readout + row * V + values, answer.to(readout.dtype.element_ty), mask=values < V)


@operator("memory_step")
def memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    memory: Tensor,
    writes: Tensor,
    forgetting: Tensor,
    strength: Tensor | None,
    basis: Tensor | None,
    sharpness: Tensor | None,
    bias: Tensor | None,
    position: Tensor,
    interval: int,
    snr: list[float],
    energy: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The read-out of one token of every sequence, (B, 1, H, V), and the state after it; ``position`` on the device.

    It has no gradient, and Python reads none of its tensors: it can be captured as a CUDA graph.
    """
    outputs = _room_for_step(v, memory, writes, forgetting, interval)
    batch, _, heads, _ = q.shape
    tokens = [x[:, 0] if x.stride(-1) == 1 or x.dim() == 3 else x[:, 0].contiguous() for x in (q, k, v, decay)]
    count_run("dissipative_memory", "triton")
    with torch.cuda.device_of(q):
        _step[(batch, heads)](
            *tokens,
            eta.float(),
            *map(contiguous, (memory, writes, forgetting)),
            position,
            *(contiguous(x, torch.float32) for x in (strength, basis, sharpness, bias)),
            *outputs,
            *(stride for x in tokens for stride in x.stride()[:2]),
            *constants_of(snr, energy, interval),
            heads,
            SNR=len(snr) > 0,
            RESONANCE=basis is not None,
            num_warps=8,
            **sizes_of(q, k, v),
        )
    return outputs


@torch.library.register_fake("resolvent::memory_step")
def _(
    q, k, v, decay, eta, memory, writes, forgetting, strength, basis, sharpness, bias, position, interval, snr, energy
):  # fmt: skip
    return _room_for_step(v, memory, writes, forgetting, interval)


def _room_for_step(
    v: Tensor, memory: Tensor, writes: Tensor, forgetting: Tensor, interval: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``memory_step`` returns, yet to be filled."""

    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    if not interval:
        return like(v), like(memory), writes.new_empty(0), forgetting.new_empty(0)
    return like(v), like(memory), like(writes), like(forgetting)
