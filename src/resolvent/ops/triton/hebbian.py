r"""Triton kernels of the dissipative Hebbian memory (see ``ops.hebbian`` for the mathematics), forward and backward.

A program holds the memory of one head of one sequence in registers and walks over chunks of 64 tokens with it: inside a
chunk a masked ``QKᵀ``, between chunks the state, at the boundaries the consolidation. Its kernels:

* ``_sum_decays``: the cumulative decays of every chunk, which the others read.
* ``_walk``: reads, writes and consolidates, forwards. For training it leaves the memory before every chunk, and the
  state that met every boundary.
* ``_walk_back``: carries the gradient of the memory backwards, and leaves it after every chunk.
* ``_chunk_gradients``: with both at hand all chunks are independent, and give the gradients of q, k, v and the decay.
* ``_step``: one token of every sequence, for generation.
* ``_chain``: where few heads meet a long sequence, it is cut into segments that walk at the same time from an empty
  memory: between boundaries the memory is linear in its past. This kernel joins their ends, and the segments walk once
  more from what came before them.
* ``_join`` and ``_join_back``: the same where memories are consolidated. Segments end at the boundaries, and only from
  boundary to boundary does one have to wait for the other.

Sums of decays are taken in float64 and only their differences are exponentiated, so that a token which erases
everything does not blur its neighbours. Products take bfloat16 (or float32 as three tf32 products), sums are float32.

Shapes: B batch, N sequence, T = B N tokens, H heads, K key width, V value width, S sequences, G segments, M chunks,
C tokens of a chunk.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend as _backend
from ..consolidation import Consolidation
from ..hebbian import CHUNK, MemoryState
from .consolidation import LOG2_E, PRECISION, consolidate, consolidate_back
from .launch import contiguous, more_than_float32
from .segments import Layout, layout_of, most_chunks, tables_on_device

_kernel: Any = triton.jit  # what it makes is launched on a grid, which no type of a function allows

_WIDEST_HEAD = 128
"""A program holds whole memories in its registers."""
_LAUNCH = {
    "narrow": {
        "walk": dict(num_warps=4, num_stages=3),
        "walk_back": dict(num_warps=4, num_stages=2, STAGES=2),
        "chunk_gradients": dict(num_warps=4, num_stages=1),
        "join": dict(num_warps=8),
        "join_back": dict(num_warps=8),
    },
    "wide": {
        "walk": dict(num_warps=8, num_stages=2),
        "walk_back": dict(num_warps=8, num_stages=1, STAGES=1),
        "chunk_gradients": dict(num_warps=8, num_stages=1),
        "join": dict(num_warps=8),
        "join_back": dict(num_warps=8),
    },
}
"""How kernels are launched for heads up to a width of 64, by measurement, and above it, where they have to fit."""


# --------------------------------------------------------------------------------------------- what the kernels share


@_kernel
def _tile(pointer, stride, rows, columns, inside, width):
    """Rows of a tensor whose columns are neighbours, zero outside: [rows, columns]."""
    mask = inside[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@_kernel
def _store_tile(pointer, stride, rows, columns, inside, width, x):
    mask = inside[:, None] & (columns < width)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], x, mask=mask)


@_kernel
def _chunk_tokens(segments, chunks, chunk, C: tl.constexpr):
    """Places of a chunk's tokens, and which of them are there."""
    segment, i = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    start, end = tl.load(segments + 6 * segment), tl.load(segments + 6 * segment + 1)
    tokens = tl.load(segments + 6 * segment + 2) + i * C + tl.arange(0, C)
    return tokens, (tokens >= start) & (tokens < end)


@_kernel
def _square(keys, values, K, V):
    """Places and mask of a (K, V) matrix in memory."""
    return keys[:, None] * V + values[None, :], (keys < K)[:, None] & (values < V)[None, :]


@_kernel
def _decays(high, low, place, C: tl.constexpr, HALF: tl.constexpr):
    """The cumulative decay L of a chunk, as ``_sum_decays`` left it: ``exp(-L)``, ``exp(L - L_C)``, and L itself."""
    slots = place * C + tl.arange(0, C)
    cumulative, total = tl.load(high + slots), tl.load(high + place * C + C - 1)
    rest = tl.zeros_like(cumulative)
    to_end = cumulative - total
    if not HALF:
        rest += tl.load(low + slots)
        to_end += rest - tl.load(low + place * C + C - 1)
    return tl.exp2(-cumulative), tl.exp2(to_end), cumulative, rest


@_kernel
def _decay_between(high, low, C: tl.constexpr, HALF: tl.constexpr):
    """``exp(L_s - L_t)`` for s <= t, zero elsewhere: [t, s]."""
    later = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    between = high[None, :] - high[:, None]
    if not HALF:
        between += low[None, :] - low[:, None]
    return tl.exp2(tl.where(later, between, float("-inf")))


@_kernel
def _force(strength, head):
    """How strongly a head's SNR filter acts: fully, unless there is a strength."""
    force = 1.0
    if strength is not None:
        force *= tl.load(strength + head).to(tl.float32)
    return force


@_kernel
def _resonance(basis, sharpness, bias, head, keys, K, BK: tl.constexpr, RESONANCE: tl.constexpr, HALF: tl.constexpr):
    """A head's basis, in the dtype of its products, sharpness and bias; zeros without a resonance."""
    modes, steepness, offset = tl.zeros([BK, BK], tl.float32), 0.0, 0.0
    if RESONANCE:
        modes += _tile(basis, K, keys, keys, keys < K, K)
        steepness += tl.load(sharpness + head).to(tl.float32)
        offset += tl.load(bias + head).to(tl.float32)
    if HALF:
        modes = modes.to(tl.float16)
    return modes, steepness, offset


@_kernel
def _is_boundary(since_boundary, chunk_end, end, interval, C: tl.constexpr):
    """Whether a boundary lies behind a chunk that is the ``since_boundary``-th since the last one."""
    return (since_boundary * C % interval == 0) & (chunk_end <= end)


@_kernel
def _load_state(memories, writes, forgetting, row, square, in_square, K, V, CONSOLIDATE: tl.constexpr):
    """Memory, writes and Γ̄ of a row, or their gradients; zeros for the last two without consolidation."""
    memory = tl.load(memories + row * K * V + square, mask=in_square, other=0.0)
    wrote, forgot = tl.zeros_like(memory), 0.0
    if CONSOLIDATE:
        wrote += tl.load(writes + row * K * V + square, mask=in_square, other=0.0)
        forgot += tl.load(forgetting + row)
    return memory, wrote, forgot


@_kernel
def _store_state(memories, writes, forgetting, row, square, in_square, K, V, memory, wrote, forgot):
    """Memory, writes and Γ̄ of a row, or their gradients."""
    tl.store(memories + row * K * V + square, memory, mask=in_square)
    tl.store(writes + row * K * V + square, wrote, mask=in_square)
    tl.store(forgetting + row, forgot)


@_kernel
def _store_sums(
    grad_strength, grad_sharpness, grad_bias, row, strength, sharpness, bias, STRENGTH: tl.constexpr,
    RESONANCE: tl.constexpr,
):  # fmt: skip
    """Gradients of a head's strength and, still by mode, of its sharpness and bias."""
    if STRENGTH:
        tl.store(grad_strength + row, strength)
    if RESONANCE:
        tl.store(grad_sharpness + row, tl.sum(sharpness))
        tl.store(grad_bias + row, tl.sum(bias))


# -------------------------------------------------------------------------------------------------------- the kernels

_VARYING = ["heads"]
"""What differs between models without asking for another kernel; lengths are no arguments at all."""


@_kernel(do_not_specialize=_VARYING)
def _sum_decays(
    decay, segments, chunks, high, low, totals, decay_token, decay_head, heads, C: tl.constexpr, HALF: tl.constexpr
):
    """Add up the decays of every chunk, in float64 and into two floats: their differences shall be exact, too. They are
    in bits, for exp2 is an instruction and exp is several; the totals are not."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tokens, inside = _chunk_tokens(segments, chunks, chunk, C)
    given = tl.load(decay + head * decay_head + tokens * decay_token, mask=inside, other=0.0).to(tl.float64)
    place = chunk * heads + head
    tl.store(totals + place, tl.sum(given, 0).to(tl.float32))
    # What is left after 40 is nothing in float32; smaller sums keep more digits.
    cumulative = tl.cumsum(tl.minimum(given, 40.0), 0) * LOG2_E
    rounded, slots = cumulative.to(tl.float32), place * C + tl.arange(0, C)
    tl.store(high + slots, rounded)
    if not HALF:
        tl.store(low + slots, (cumulative - rounded.to(tl.float64)).to(tl.float32))


@_kernel(do_not_specialize=_VARYING)
def _walk(
    q, k, v, high, low, totals, eta, segments, initial, initial_writes, initial_forgetting,
    strength, basis, sharpness, bias,
    readout, final, final_writes, final_forgetting, before, met, met_writes, met_forgetting,
    q_token, q_head, k_token, k_head, v_token, v_head,
    threshold, temperature, gamma_boost, eta_boost, energy, interval, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    READ: tl.constexpr, SAVE: tl.constexpr, STATE: tl.constexpr, SNR: tl.constexpr, RESONANCE: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Walk over a segment with the memory of a head. Without consolidation its total decay stands for the final Γ̄."""
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    CONSOLIDATE: tl.constexpr = SNR or RESONANCE
    start, end = tl.load(segments + 6 * segment), tl.load(segments + 6 * segment + 1)
    slot, chunk = tl.load(segments + 6 * segment + 2), tl.load(segments + 6 * segment + 3)
    since_boundary, boundary = tl.load(segments + 6 * segment + 4), tl.load(segments + 6 * segment + 5)
    rate, row = tl.load(eta + head), segment * heads + head
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    square, in_square = _square(keys, values, K, V)

    memory, writes, forgetting = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32), 0.0
    if STATE:
        memory, writes, forgetting = _load_state(
            initial, initial_writes, initial_forgetting, row, square, in_square, K, V, CONSOLIDATE
        )
    force = _force(strength, head)
    modes, steepness, offset = _resonance(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)

    q, k, v = q + head * q_head, k + head * k_head, v + head * v_head
    total_decay = 0.0
    for i in range(0, tl.where(end > start, tl.cdiv(end - slot, C), 0).to(tl.int32)):
        tokens = slot + i * C + tl.arange(0, C)
        inside = (tokens >= start) & (tokens < end)
        key = _tile(k, k_token, tokens, keys, inside, K)
        value = _tile(v, v_token, tokens, values, inside, V)
        place = (chunk + i) * heads + head
        from_start, to_end, cumulative, rest = _decays(high, low, place, C, HALF)
        total = tl.load(totals + place)
        if SAVE:
            tl.store(before + place * K * V + square, memory.to(before.dtype.element_ty), mask=in_square)
        if READ:
            query = _tile(q, q_token, tokens, keys, inside, K)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            scores = scores * _decay_between(cumulative, rest, C, HALF) * rate
            out = tl.dot(query, memory.to(query.dtype), input_precision=PRECISION) * from_start[:, None]
            out = tl.dot(scores.to(value.dtype), value, out, input_precision=PRECISION)
            _store_tile(readout + head * V, heads * V, tokens, values, inside, V, out.to(readout.dtype.element_ty))
        key = (key * (rate * to_end)[:, None]).to(value.dtype)
        written = tl.dot(tl.trans(key), value, input_precision=PRECISION)
        kept = tl.exp(-total)
        memory = memory * kept + written
        total_decay += total
        if CONSOLIDATE:
            writes = writes * kept + written
            forgetting += total
            if _is_boundary(since_boundary + i + 1, slot + (i + 1) * C, end, interval, C):
                if SAVE:
                    crossed = boundary * heads + head
                    _store_state(
                        met, met_writes, met_forgetting, crossed, square, in_square, K, V, memory, writes, forgetting
                    )
                boundary += 1
                memory = consolidate(
                    memory, writes, forgetting, force, modes, steepness, offset, threshold, temperature, gamma_boost,
                    eta_boost, energy, K, V, SNR, RESONANCE,
                )  # fmt: skip
                writes = tl.zeros_like(writes)
                forgetting = 0.0

    if CONSOLIDATE:
        _store_state(final, final_writes, final_forgetting, row, square, in_square, K, V, memory, writes, forgetting)
    else:
        tl.store(final + row * K * V + square, memory, mask=in_square)
        tl.store(final_forgetting + row, total_decay)


@_kernel(do_not_specialize=_VARYING)
def _walk_back(
    q, high, low, totals, segments, grad_readout, grad_final, grad_final_writes, grad_final_forgetting,
    strength, basis, sharpness, bias, before, met, met_writes, met_forgetting, left_at_end, of_left,
    grad_written, grad_total, grad_initial, grad_initial_writes, grad_initial_forgetting,
    grad_strength, grad_sharpness, grad_bias,
    q_token, q_head,
    threshold, temperature, gamma_boost, eta_boost, energy, interval, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SAVE: tl.constexpr, FINAL: tl.constexpr, CARRY: tl.constexpr, SNR: tl.constexpr, RESONANCE: tl.constexpr,
    HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk back over a segment with the gradient of the memory of a head.

    Leaves after every chunk the gradient of what the chunk wrote, and of its total decay as far as it acts on the
    memory. If it is not to ``CARRY`` the gradients of the writes and of Γ̄, the segment's total decay stands for the
    gradient of the initial Γ̄.

    The writes ΔS were kept at boundaries alone. In between they are what the memory has beyond what is left of it from
    the last boundary, ``ΔS = S - exp(-Γ̄) S_b``, and as their gradient fades like what is left, its product with that,
    ``of_left``, is the same for all chunks between two boundaries.
    """
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    CONSOLIDATE: tl.constexpr = SNR or RESONANCE
    start, end = tl.load(segments + 6 * segment), tl.load(segments + 6 * segment + 1)
    slot, chunk = tl.load(segments + 6 * segment + 2), tl.load(segments + 6 * segment + 3)
    since_boundary, row = tl.load(segments + 6 * segment + 4), segment * heads + head
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    square, in_square = _square(keys, values, K, V)

    grad, grad_writes, grad_forgetting = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32), 0.0
    if FINAL:
        grad, grad_writes, grad_forgetting = _load_state(
            grad_final, grad_final_writes, grad_final_forgetting, row, square, in_square, K, V, CARRY
        )
    force = _force(strength, head)
    modes, steepness, offset = _resonance(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)
    sum_sharpness, sum_bias, sum_strength = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32), 0.0
    total_decay, along_left = 0.0, 0.0

    q, grad_readout = q + head * q_head, grad_readout + head * V
    count = tl.where(end > start, tl.cdiv(end - slot, C), 0).to(tl.int32)
    if CONSOLIDATE:
        boundary = tl.load(segments + 6 * segment + 5) + tl.maximum(end - slot + since_boundary * C, 0) // interval
        if FINAL:
            left = tl.load(left_at_end + row * K * V + square, mask=in_square, other=0.0)
            along_left += tl.sum(grad_writes * left)
    elif CARRY:
        along_left += tl.load(of_left + row)
    for j in tl.range(0, count, num_stages=STAGES):
        i = count - 1 - j
        tokens = slot + i * C + tl.arange(0, C)
        inside = (tokens >= start) & (tokens < end)
        query = _tile(q, q_token, tokens, keys, inside, K)
        upstream = _tile(grad_readout, heads * V, tokens, values, inside, V)
        place = (chunk + i) * heads + head
        from_start, _, _, _ = _decays(high, low, place, C, HALF)
        total = tl.load(totals + place)
        kept = tl.exp(-total)
        total_decay += total
        if SAVE:
            memory = tl.load(before + place * K * V + square, mask=in_square, other=0.0).to(tl.float32)
        if CONSOLIDATE:  # noqa: SIM102 (the outer one when the kernel is compiled)
            if _is_boundary(since_boundary + i + 1, slot + (i + 1) * C, end, interval, C):
                boundary -= 1
                crossed = boundary * heads + head
                grad, grad_writes, grad_forgetting, a_strength, a_sharpness, a_bias, along_left = consolidate_back(
                    grad, met + crossed * K * V, met_writes + crossed * K * V, square, in_square,
                    tl.load(met_forgetting + crossed), force, modes, steepness, offset, threshold, temperature,
                    gamma_boost, eta_boost, energy, K, V, BK, SNR, strength is not None, RESONANCE,
                )  # fmt: skip
                sum_strength += a_strength
                sum_sharpness += a_sharpness
                sum_bias += a_bias
        if SAVE:
            of_written = grad
            if CARRY:
                of_written += grad_writes
            of_total = grad_forgetting + along_left - kept * tl.sum(of_written * memory)
            tl.store(grad_written + place * K * V + square, of_written.to(query.dtype), mask=in_square)
            tl.store(grad_total + place, of_total)
        if CARRY:
            grad_writes = grad_writes * kept
        query = (query * from_start[:, None]).to(query.dtype)
        grad = tl.dot(tl.trans(query), upstream, grad * kept, input_precision=PRECISION)

    if CARRY:
        _store_state(
            grad_initial, grad_initial_writes, grad_initial_forgetting, row, square, in_square, K, V, grad, grad_writes,
            grad_forgetting,
        )  # fmt: skip
    else:
        tl.store(grad_initial + row * K * V + square, grad, mask=in_square)
        tl.store(grad_initial_forgetting + row, total_decay)
    _store_sums(
        grad_strength, grad_sharpness, grad_bias, row, sum_strength, sum_sharpness, sum_bias,
        SNR and strength is not None, RESONANCE,
    )  # fmt: skip


@_kernel(do_not_specialize=_VARYING)
def _chunk_gradients(
    q, k, v, high, low, totals, eta, segments, chunks, grad_readout, before, grad_written, grad_total,
    grad_q, grad_k, grad_v, grad_decay, grad_eta,
    q_token, q_head, k_token, k_head, v_token, v_head, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of one chunk, given the memory before it and the gradient of the memory after it."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tokens, inside = _chunk_tokens(segments, chunks, chunk, C)
    rate, place = tl.load(eta + head), chunk * heads + head
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    there = tl.max(inside.to(tl.int32), 0)  # for a row of no token, nobody wrote what would be read
    square, in_square = _square(keys, values, K * there, V)

    query = _tile(q + head * q_head, q_token, tokens, keys, inside, K)
    key = _tile(k + head * k_head, k_token, tokens, keys, inside, K)
    value = _tile(v + head * v_head, v_token, tokens, values, inside, V)
    upstream = _tile(grad_readout + head * V, heads * V, tokens, values, inside, V)
    from_start, to_end, cumulative, rest = _decays(high, low, place, C, HALF)
    memory = tl.load(before + place * K * V + square, mask=in_square, other=0.0).to(query.dtype)
    of_written = tl.load(grad_written + place * K * V + square, mask=in_square, other=0.0)

    # Within the chunk. A token's own term does not depend on the decay: left out, it costs the others no digits.
    between = _decay_between(cumulative, rest, C, HALF) * rate
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    score_grad = tl.dot(upstream, tl.trans(value), input_precision=PRECISION) * between
    earlier = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
    exponents = tl.where(earlier, score_grad * scores, 0.0)
    of_cumulative = tl.sum(exponents, 0) - tl.sum(exponents, 1)
    scores = (scores * between).to(value.dtype)
    score_grad = score_grad.to(value.dtype)

    # And through the memory.
    scaled_key = (key * (rate * to_end)[:, None]).to(value.dtype)
    value_grad = tl.dot(scaled_key, of_written, input_precision=PRECISION)
    value_grad = tl.dot(tl.trans(scores), upstream, value_grad, input_precision=PRECISION)
    _store_tile(grad_v + head * V, heads * V, tokens, values, inside, V, value_grad.to(grad_v.dtype.element_ty))

    query_grad = tl.dot(upstream, tl.trans(memory), input_precision=PRECISION) * from_start[:, None]
    of_cumulative -= tl.sum(query_grad * query, 1)
    query_grad = tl.dot(score_grad, key, query_grad, input_precision=PRECISION)
    _store_tile(grad_q + head * K, heads * K, tokens, keys, inside, K, query_grad.to(grad_q.dtype.element_ty))

    key_grad = tl.dot(value, tl.trans(of_written), input_precision=PRECISION) * (rate * to_end)[:, None]
    from_keys = tl.sum(key_grad * key, 1)
    of_cumulative += from_keys
    key_grad = tl.dot(tl.trans(score_grad), query, key_grad, input_precision=PRECISION)
    _store_tile(grad_k + head * K, heads * K, tokens, keys, inside, K, key_grad.to(grad_k.dtype.element_ty))
    # An η that has underflown is out of reach: its logarithm has a gradient of zero.
    tl.store(grad_eta + place, tl.where(rate > 0, tl.sum(key_grad * key) / rate, 0.0))

    of_total = tl.load(grad_total + place) - tl.sum(from_keys)
    of_decay = tl.cumsum(of_cumulative, 0, reverse=True) + of_total
    tl.store(grad_decay + tokens * heads + head, of_decay, mask=inside)


@_kernel
def _advance(
    query, key, value, decay, state, wrote, forgot, memory, writes, forgetting, boundary, force, basis, sharpness, bias,
    row, head, threshold, temperature, gamma_boost, eta_boost, energy,
    K, V, BK: tl.constexpr, BV: tl.constexpr, SNR: tl.constexpr, RESONANCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A memory learns ``key`` (with its rate η) and ``value``, answers ``query``, and is stored."""
    square, in_square = _square(tl.arange(0, BK), tl.arange(0, BV), K, V)
    square += row * K * V
    kept, written = tl.exp(-decay), key[:, None] * value[None, :]
    state = state * kept + written
    answer = tl.sum(state * query[:, None], 0)
    if SNR or RESONANCE:
        wrote, forgot = wrote * kept + written, forgot + decay
        if boundary:
            keys = tl.arange(0, BK)
            modes, steepness, offset = _resonance(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)
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


@_kernel(do_not_specialize=_VARYING)
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
    square, in_square = _square(keys, values, K, V)
    state, wrote, forgot = _load_state(memory, writes, forgetting, row, square, in_square, K, V, SNR or RESONANCE)
    answer = _advance(
        query, key * tl.load(eta + head), value, forgets, state, wrote, forgot, new_memory, new_writes, new_forgetting,
        boundary, _force(strength, head), basis, sharpness, bias, row, head, threshold, temperature, gamma_boost,
        eta_boost, energy, K, V, BK, BV, SNR, RESONANCE, HALF,
    )  # fmt: skip
    tl.store(readout + row * V + values, answer.to(readout.dtype.element_ty), mask=values < V)


@_kernel(do_not_specialize=["heads", "size"])
def _chain(
    ends, decay, first_segment, start, starts, last, heads, size,
    BLOCK: tl.constexpr, START: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Join segments that walked from an empty memory: what stood before each of them, and what is left at the end."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    places = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    first, stop = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    row = (sequence * heads + head) * size + places
    memory = tl.zeros([BLOCK], tl.float32)
    if START:
        memory += tl.load(start + row, mask=inside, other=0.0)
    for j in range(0, (stop - first).to(tl.int32)):
        segment = tl.where(REVERSE, stop - 1 - j, first + j) * heads + head
        tl.store(starts + segment * size + places, memory, mask=inside)
        end = tl.load(ends + segment * size + places, mask=inside, other=0.0)
        memory = tl.exp(-tl.load(decay + segment)) * memory + end
    tl.store(last + row, memory, mask=inside)


@_kernel
def _ends_at_boundary(segments, segment, interval, C: tl.constexpr):
    """Whether a boundary lies behind a segment."""
    start, end = tl.load(segments + 6 * segment), tl.load(segments + 6 * segment + 1)
    slot, since_boundary = tl.load(segments + 6 * segment + 2), tl.load(segments + 6 * segment + 4)
    return (end > start) & ((since_boundary * C + end - slot) % interval == 0)


@_kernel(do_not_specialize=_VARYING)
def _join(
    ends, decays, segments, first_segment, initial, initial_writes, initial_forgetting,
    strength, basis, sharpness, bias,
    starts, final, final_writes, final_forgetting, met, met_writes, met_forgetting,
    threshold, temperature, gamma_boost, eta_boost, energy, interval, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    SAVE: tl.constexpr, STATE: tl.constexpr, SNR: tl.constexpr, RESONANCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Join segments that walked from an empty memory, consolidating at boundaries: what stood before each of them."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, stop = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    keys, row = tl.arange(0, BK), sequence * heads + head
    square, in_square = _square(keys, tl.arange(0, BV), K, V)
    memory, writes, forgetting = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32), 0.0
    if STATE:
        memory, writes, forgetting = _load_state(
            initial, initial_writes, initial_forgetting, row, square, in_square, K, V, True
        )
    force = _force(strength, head)
    modes, steepness, offset = _resonance(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)

    # The next end is asked for before this one is consolidated: memory is slow, and all wait for this walk.
    written = tl.load(ends + (first * heads + head) * K * V + square, mask=in_square, other=0.0)
    for j in range(0, (stop - first).to(tl.int32)):
        segment = first + j
        place = segment * heads + head
        tl.store(starts + place * K * V + square, memory, mask=in_square)
        following = tl.minimum(segment + 1, stop - 1) * heads + head
        upcoming = tl.load(ends + following * K * V + square, mask=in_square, other=0.0)
        boundary = _ends_at_boundary(segments, segment, interval, C)
        total = tl.load(decays + place)
        kept = tl.exp(-total)
        memory, writes, forgetting = memory * kept + written, writes * kept + written, forgetting + total
        if boundary:
            if SAVE:
                crossed = tl.load(segments + 6 * segment + 5) * heads + head
                _store_state(
                    met, met_writes, met_forgetting, crossed, square, in_square, K, V, memory, writes, forgetting
                )
            memory = consolidate(
                memory, writes, forgetting, force, modes, steepness, offset, threshold, temperature, gamma_boost,
                eta_boost, energy, K, V, SNR, RESONANCE,
            )  # fmt: skip
            writes = tl.zeros_like(writes)
            forgetting = 0.0
        written = upcoming

    _store_state(final, final_writes, final_forgetting, row, square, in_square, K, V, memory, writes, forgetting)


@_kernel(do_not_specialize=_VARYING)
def _join_back(
    segments, first_segment, ends, decays, grad_final, grad_final_writes, grad_final_forgetting,
    strength, basis, sharpness, bias, met, met_writes, met_forgetting, left_at_end,
    starts, starts_writes, starts_forgetting, of_left,
    grad_initial, grad_initial_writes, grad_initial_forgetting, grad_strength, grad_sharpness, grad_bias,
    threshold, temperature, gamma_boost, eta_boost, energy, interval, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FINAL: tl.constexpr, SNR: tl.constexpr, RESONANCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Join the gradients of segments that walked back from nothing (``ends``): those behind each of them (``starts``),
    before a boundary that may lie there, and their ``of_left`` (see ``_walk_back``)."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, stop = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    keys, values, row = tl.arange(0, BK), tl.arange(0, BV), sequence * heads + head
    square, in_square = _square(keys, values, K, V)
    grad, grad_writes, grad_forgetting = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32), 0.0
    along_left = 0.0
    if FINAL:
        grad, grad_writes, grad_forgetting = _load_state(
            grad_final, grad_final_writes, grad_final_forgetting, row, square, in_square, K, V, True
        )
        along_left += tl.sum(grad_writes * tl.load(left_at_end + row * K * V + square, mask=in_square, other=0.0))
    force = _force(strength, head)
    modes, steepness, offset = _resonance(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)
    sum_sharpness, sum_bias, sum_strength = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32), 0.0

    for j in range(0, (stop - first).to(tl.int32)):
        segment = stop - 1 - j
        place = segment * heads + head
        end = tl.load(ends + place * K * V + square, mask=in_square, other=0.0)
        if _ends_at_boundary(segments, segment, interval, C):
            crossed = tl.load(segments + 6 * segment + 5) * heads + head
            grad, grad_writes, grad_forgetting, a_strength, a_sharpness, a_bias, along_left = consolidate_back(
                grad, met + crossed * K * V, met_writes + crossed * K * V, square, in_square,
                tl.load(met_forgetting + crossed), force, modes, steepness, offset, threshold, temperature,
                gamma_boost, eta_boost, energy, K, V, BK, SNR, strength is not None, RESONANCE,
            )  # fmt: skip
            sum_strength += a_strength
            sum_sharpness += a_sharpness
            sum_bias += a_bias
        _store_state(
            starts, starts_writes, starts_forgetting, place, square, in_square, K, V, grad, grad_writes, grad_forgetting
        )
        tl.store(of_left + place, along_left)
        kept = tl.exp(-tl.load(decays + place))
        grad, grad_writes = grad * kept + end, grad_writes * kept

    _store_state(
        grad_initial, grad_initial_writes, grad_initial_forgetting, row, square, in_square, K, V, grad, grad_writes,
        grad_forgetting,
    )  # fmt: skip
    _store_sums(
        grad_strength, grad_sharpness, grad_bias, row, sum_strength, sum_sharpness, sum_bias,
        SNR and strength is not None, RESONANCE,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the launches

_Optional = Tensor | None
_State = tuple[_Optional, _Optional, _Optional]
"""Memory, writes and Γ̄, or their gradients."""
_NO_FILTERS = dict(SNR=False, RESONANCE=False)


class _Call:
    """One call of the operator: its inputs as the kernels want them, and the kernels' launches."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        eta: Tensor,
        strength: _Optional,
        basis: _Optional,
        sharpness: _Optional,
        bias: _Optional,
        position: _Optional,
        cu_seqlens: _Optional,
        segments: _Optional,
        chunks: _Optional,
        interval: int,
        snr: list[float],
        energy: float,
    ):
        if segments is not None and chunks is not None:
            self.layout = Layout(segments, chunks)
        else:
            self.layout = layout_of(q, position, cu_seqlens, interval)
        self.heads = q.shape[2]
        self.tokens = [_rows(x.to(_product_dtype(q, k, v))) for x in (q, k, v)]
        self.eta = eta.float().contiguous()
        self.filters = [contiguous(x, torch.float32) for x in (strength, basis, sharpness, bias)]
        self.strides = [stride for x in self.tokens for stride in x.stride()[:2]]
        self.interval, self.constants = interval, _constants(snr, energy, interval)
        self.sizes: dict[str, Any] = dict(_sizes(q, k, v), C=CHUNK)
        self.mechanisms = dict(SNR=len(snr) > 0, RESONANCE=basis is not None)
        self.segments = len(self.layout.segments)
        self.launch = _LAUNCH["narrow" if max(self.sizes["K"], self.sizes["V"]) <= 64 else "wide"]
        self.decays = self._sums_of(decay)

    def _sums_of(self, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cumulative decays of every chunk, in two floats (M, H, C), and their totals (M, H)."""
        chunks = len(self.layout.chunks)
        high, rows = self.eta.new_empty((chunks, self.heads, CHUNK)), _rows(decay)
        low = high if self.sizes["HALF"] else torch.empty_like(high)
        totals = self.eta.new_empty((chunks, self.heads))
        if chunks:
            with torch.cuda.device_of(decay):
                _sum_decays[(chunks, self.heads)](
                    rows,
                    self.layout.segments,
                    self.layout.chunks,
                    high,
                    low,
                    totals,
                    *rows.stride(),
                    self.heads,
                    C=CHUNK,
                    HALF=self.sizes["HALF"],
                    num_warps=1,
                )
        return high, low, totals

    def segment_memories(self) -> Tensor:
        """Room for a memory, or its gradient, of every segment."""
        return self.eta.new_empty((self.segments, self.heads, self.sizes["K"], self.sizes["V"]))

    def segment_decays(self) -> Tensor:
        """Room for the total decay of every segment."""
        return self.eta.new_empty((self.segments, self.heads))

    def segment_states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the state, or its gradient, of every segment."""
        return self.segment_memories(), self.segment_memories(), self.segment_decays()

    def walk(
        self,
        readout: _Optional,
        start: _State,
        final: _State,
        before: _Optional,
        met: _State = (None, None, None),
        consolidate: bool = True,
    ) -> None:
        """Read the segments from their ``start`` into ``readout`` and their ``final`` states, and save the memory
        ``before`` every chunk and the states that ``met`` the boundaries. Segments that end at boundaries leave it to
        others to ``consolidate``."""
        with torch.cuda.device_of(self.eta):
            _walk[(self.segments, self.heads)](
                *self.tokens,
                *self.decays,
                self.eta,
                self.layout.segments,
                *map(contiguous, start),
                *self.filters,
                readout,
                *final,
                before,
                *met,
                *self.strides,
                *self.constants,
                self.heads,
                READ=readout is not None,
                SAVE=before is not None,
                STATE=start[0] is not None,
                **self.launch["walk"],
                **self.sizes,
                **(self.mechanisms if consolidate else _NO_FILTERS),
            )

    def walk_back(
        self,
        grad_readout: Tensor,
        grad_final: _State,
        saved: tuple[Tensor, Tensor, Tensor] | None,
        grad_start: tuple[_Optional, ...],
        met: _State = (None, None, None),
        left: _Optional = None,
        of_left: _Optional = None,
        consolidate: bool = True,
    ) -> None:
        """Carry the gradient of the memory back to the start of the segments, as ``walk`` went.

        ``saved`` holds the memory before every chunk, and room for the gradients of what it wrote and of its total
        decay. At the end ``left`` is what the memory still has from before the last boundary; where ``join_back``
        consolidates, it found ``of_left``.
        """
        before, grad_written, grad_total = saved or (None, None, None)
        with torch.cuda.device_of(self.eta):
            _walk_back[(self.segments, self.heads)](
                self.tokens[0],
                *self.decays,
                self.layout.segments,
                grad_readout,
                *map(contiguous, grad_final),
                *self.filters,
                before,
                *met,
                left,
                of_left,
                grad_written,
                grad_total,
                *grad_start,
                *self.strides[:2],
                *self.constants,
                self.heads,
                SAVE=before is not None,
                FINAL=grad_final[0] is not None,
                CARRY=self.interval > 0 and grad_start[1] is not None,
                **self.launch["walk_back"],
                **self.sizes,
                **(self.mechanisms if consolidate else _NO_FILTERS),
            )

    def chunk_gradients(
        self, grad_readout: Tensor, before: Tensor, grad_written: Tensor, grad_total: Tensor, grads: tuple[Tensor, ...]
    ) -> None:
        """The gradients of q, k, v, decay and eta, a row a chunk of the last."""
        with torch.cuda.device_of(self.eta):
            _chunk_gradients[(len(self.layout.chunks), self.heads)](
                *self.tokens,
                *self.decays,
                self.eta,
                self.layout.segments,
                self.layout.chunks,
                grad_readout,
                before,
                grad_written,
                grad_total,
                *grads,
                *self.strides,
                self.heads,
                **self.launch["chunk_gradients"],
                **self.sizes,
            )

    def chain(
        self, ends: Tensor, decays: Tensor, start: _Optional, starts: Tensor, last: Tensor, reverse: bool
    ) -> None:
        """Join the segments: ``ends`` of their walks from nothing, from ``start`` to ``last`` through ``starts``."""
        size, block = self.sizes["K"] * self.sizes["V"], 256
        with torch.cuda.device_of(self.eta):
            _chain[(len(last), self.heads, triton.cdiv(size, block))](
                ends,
                decays,
                self.layout.first_segment,
                contiguous(start),
                starts,
                last,
                self.heads,
                size,
                BLOCK=block,
                START=start is not None,
                REVERSE=reverse,
            )

    def join(self, ends: Tensor, decays: Tensor, start: _State, starts: Tensor, final: _State, met: _State) -> None:
        """``chain`` with consolidation, forwards: from the state ``start`` to ``final`` through ``starts``, saving the
        states that ``met`` the boundaries."""
        with torch.cuda.device_of(ends):
            _join[self._over_sequences()](
                ends,
                decays,
                self.layout.segments,
                self.layout.first_segment,
                *map(contiguous, start),
                *self.filters,
                starts,
                *final,
                *met,
                *self.constants,
                self.heads,
                SAVE=met[0] is not None,
                STATE=start[0] is not None,
                **self.launch["join"],
                **self.sizes,
                **self.mechanisms,
            )

    def join_back(
        self,
        ends: Tensor,
        decays: Tensor,
        grad_final: _State,
        met: tuple[Tensor, Tensor, Tensor],
        left: _Optional,
        starts: _State,
        of_left: Tensor,
        grad_start: tuple[Tensor, ...],
    ) -> None:
        """``chain`` with consolidation, backwards: through ``starts`` and ``of_left`` to ``grad_start``."""
        with torch.cuda.device_of(ends):
            _join_back[self._over_sequences()](
                self.layout.segments,
                self.layout.first_segment,
                ends,
                decays,
                *map(contiguous, grad_final),
                *self.filters,
                *met,
                left,
                *starts,
                of_left,
                *grad_start,
                *self.constants,
                self.heads,
                FINAL=grad_final[0] is not None,
                **self.launch["join_back"],
                **self.sizes,
                **self.mechanisms,
            )

    def _over_sequences(self) -> tuple[int, int]:
        """The grid of a program for each head of a sequence."""
        assert self.layout.first_segment is not None
        return len(self.layout.first_segment) - 1, self.heads


def _rows(x: Tensor) -> Tensor:
    """(B, N, H, ...) -> (T, H, ...) with neighbours in the last axis; a view where the layout allows it."""
    x = x.flatten(0, 1)
    return x if x.dim() == 2 or x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What every kernel is compiled for: the widths of a head, padded to what products take, and their precision."""
    key, value = q.shape[-1], v.shape[-1]
    padded = (max(16, triton.next_power_of_2(width)) for width in (key, value))
    return dict(
        zip(("K", "V", "BK", "BV"), (key, value, *padded), strict=True), HALF=_product_dtype(q, k, v) != torch.float32
    )


def _parts_of(consolidation: Consolidation | None) -> tuple[tuple[_Optional, ...], dict[str, Any]]:
    """Strength of the SNR filter, basis, sharpness and bias of the resonance; and ``interval``, ``snr`` and ``energy``,
    as ``_memory`` has them."""
    snr = consolidation.snr if consolidation else None
    resonance = consolidation.resonance if consolidation else None
    modes = (resonance.basis, resonance.sharpness, resonance.bias) if resonance else (None, None, None)
    return (snr.strength if snr else None, *modes), dict(
        interval=consolidation.interval if consolidation and (snr or resonance) else 0,
        snr=[snr.threshold, snr.temperature, snr.gamma_boost, snr.eta_boost] if snr else [],
        energy=resonance.threshold if resonance else 0.0,
    )


def _constants(snr: list[float], energy: float, interval: int) -> tuple[float | int, ...]:
    """The numbers of the consolidation, as the kernels take them."""
    return *(snr or (0.0, 1.0, 1.0, 1.0)), energy, interval


def _product_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


# ------------------------------------------------------------------------------------------------------- the operator


def _refuses(dtype: torch.dtype, *widths: int) -> str | None:
    """What the kernels cannot do."""
    too_wide = f"its kernel holds heads up to a width of {_WIDEST_HEAD}, got {max(widths)}"
    return more_than_float32(dtype) or (too_wide if max(widths) > _WIDEST_HEAD else None)


@_backend.register("dissipative_memory", "triton", refuses=_refuses)
def _dissipative_memory_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    state: MemoryState | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    consolidation: Consolidation | None,
) -> tuple[Tensor, MemoryState]:
    parameters, constants = _parts_of(consolidation)
    tensors = (q, k, v, decay, eta, *(state or (None, None, None)), *parameters)
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if q.shape[1] == 1 and cu_seqlens is None and state is not None and not needs_gradient:
        if position is None:
            position = torch.zeros(len(q), dtype=torch.long)
        readout, memory, writes, forgetting = _memory_step(*tensors, position.to(q.device), **constants)
    else:
        tables = tables_on_device(cu_seqlens, position, q.shape[1], constants["interval"])
        outputs = _memory(*tensors, position, cu_seqlens, *tables, **constants, save=needs_gradient)
        readout, memory, writes, forgetting, *_ = outputs
    if constants["interval"]:
        return readout, MemoryState(memory, writes, forgetting)
    # Nothing reads the rest without consolidation: it stays as it was.
    kept = (state.writes, state.forgetting) if state else (torch.zeros_like(memory), memory.new_zeros(memory.shape[:2]))
    return readout, MemoryState(memory, *kept)


@_backend.operator("memory_step")
def _memory_step(
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
    with torch.cuda.device_of(q):
        _step[(batch, heads)](
            *tokens,
            eta.float(),
            *map(contiguous, (memory, writes, forgetting)),
            position,
            *(contiguous(x, torch.float32) for x in (strength, basis, sharpness, bias)),
            *outputs,
            *(stride for x in tokens for stride in x.stride()[:2]),
            *_constants(snr, energy, interval),
            heads,
            SNR=len(snr) > 0,
            RESONANCE=basis is not None,
            num_warps=8,
            **_sizes(q, k, v),
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
    """What ``_memory_step`` returns, yet to be filled."""

    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    if not interval:
        return like(v), like(memory), writes.new_empty(0), forgetting.new_empty(0)
    return like(v), like(memory), like(writes), like(forgetting)


@_backend.operator("memory")
def _memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    memory: Tensor | None,
    writes: Tensor | None,
    forgetting: Tensor | None,
    strength: Tensor | None,
    basis: Tensor | None,
    sharpness: Tensor | None,
    bias: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    chunks: Tensor | None,
    interval: int,
    snr: list[float],
    energy: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The read-out, the final state, and what the gradient needs: the memory before every chunk, and the states that
    met the boundaries.

    ``snr`` holds threshold, temperature, gamma_boost and eta_boost, or nothing; ``interval`` is 0 without
    consolidation, and then the final writes and Γ̄ mean nothing. What is saved has a row for every chunk and boundary
    there may be.
    ``segments`` and ``chunks`` are what ``tables_on_device`` gives; without them Python reads the offsets.
    """
    call = _Call(
        q, k, v, decay, eta, strength, basis, sharpness, bias, position, cu_seqlens, segments, chunks, interval, snr,
        energy,
    )  # fmt: skip
    outputs = _room(q, k, v, decay, position, cu_seqlens, interval, save)
    readout, final, final_writes, final_forgetting, before, met, met_writes, met_forgetting = outputs
    start, last = (memory, writes, forgetting), (final, final_writes, final_forgetting)
    to_save, to_meet = (before, (met, met_writes, met_forgetting)) if save else (None, (None, None, None))
    if not call.layout.segmented:
        call.walk(readout, start, last, to_save, to_meet)
        return outputs
    ends, starts, decays = call.segment_memories(), call.segment_memories(), call.segment_decays()
    call.walk(None, (None, None, None), (ends, None, decays), None, consolidate=False)
    if interval:
        call.join(ends, decays, start, starts, last, to_meet)
    else:
        call.chain(ends, decays, memory, starts, final, reverse=False)
    call.walk(readout, (starts, None, None), (ends, None, decays), to_save, consolidate=False)
    return outputs


@torch.library.register_fake("resolvent::memory")
def _(
    q, k, v, decay, eta, memory, writes, forgetting, strength, basis, sharpness, bias, position, cu_seqlens, segments,
    chunks, interval, snr, energy, save,
):  # fmt: skip
    return _room(q, k, v, decay, position, cu_seqlens, interval, save)


def _room(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    position: _Optional,
    cu_seqlens: _Optional,
    interval: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``_memory`` returns, yet to be filled."""
    (batch, length, heads, key), value = q.shape, v.shape[-1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # A bound that follows from the shapes alone: a sequence that goes on inside a chunk may touch one more.
    if cu_seqlens is None:
        chunks = batch * -(-length // CHUNK) + (sequences if position is not None else 0)
    else:
        chunks = most_chunks(length, sequences, position is not None)
    chunks = chunks if save else 0
    most = batch * (length // interval) + (sequences if position is not None else 0) if interval else 0
    boundaries = most if save else 0

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return decay.new_empty(shape, dtype=dtype)

    return (
        room(batch, length, heads, value, dtype=v.dtype),
        room(sequences, heads, key, value),
        room(sequences if interval else 0, heads, key, value),
        room(sequences, heads),
        room(chunks, heads, key, value, dtype=_product_dtype(q, k, v)),
        # The gradient of a consolidation asks for digits that products do not.
        room(boundaries, heads, key, value),
        room(boundaries, heads, key, value),
        room(boundaries, heads),
    )


@_backend.operator("memory_backward")
def _memory_backward(
    grad_readout: Tensor,
    grad_memory: Tensor | None,
    grad_writes: Tensor | None,
    grad_forgetting: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    strength: Tensor | None,
    basis: Tensor | None,
    sharpness: Tensor | None,
    bias: Tensor | None,
    last: Tensor,
    last_writes: Tensor,
    before: Tensor,
    met: Tensor,
    met_writes: Tensor,
    met_forgetting: Tensor,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    chunks: Tensor | None,
    interval: int,
    snr: list[float],
    energy: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay, eta, the initial state, the strength, the sharpness and the bias.

    That of eta has a row for every chunk, those of the last three one for every sequence, to be summed up.
    """
    call = _Call(
        q, k, v, decay, eta, strength, basis, sharpness, bias, position, cu_seqlens, segments, chunks, interval, snr,
        energy,
    )  # fmt: skip
    outputs = _room_for_gradients(grad_readout, q, k, v, decay, before, strength, basis, cu_seqlens, interval)
    grad_q, grad_k, grad_v, grad_decay, grad_eta, grad_initial, *others = outputs
    upstream = grad_readout.to(call.tokens[0].dtype).contiguous()
    grad_written = before.new_empty(before.shape, dtype=upstream.dtype)
    grad_total = before.new_empty(before.shape[:2], dtype=torch.float32)
    saved, final = (before, grad_written, grad_total), (grad_memory, grad_writes, grad_forgetting)
    state, start = (met, met_writes, met_forgetting), (grad_initial, *others)
    left = last - last_writes if interval and grad_memory is not None else None
    if not call.layout.segmented:
        call.walk_back(upstream, final, saved, start, state, left)
    else:
        ends, of_left, decays = call.segment_memories(), call.segment_decays(), call.segment_decays()
        nowhere = (None, None, None)
        call.walk_back(upstream, nowhere, None, (ends, None, decays, *nowhere), consolidate=False)
        if interval:
            behind = call.segment_states()
            call.join_back(ends, decays, final, state, left, behind, of_left, start)
            # A program reads the gradient behind its segment before it writes the one before it.
            to_segments = (*behind, *nowhere)
        else:
            behind = (call.segment_memories(), None, None)
            call.chain(ends, decays, grad_memory, behind[0], grad_initial, reverse=True)
            to_segments = (ends, None, decays, *nowhere)
        call.walk_back(upstream, behind, saved, to_segments, of_left=of_left, consolidate=False)
    call.chunk_gradients(upstream, before, grad_written, grad_total, (grad_q, grad_k, grad_v, grad_decay, grad_eta))
    return outputs


@torch.library.register_fake("resolvent::memory_backward")
def _(
    grad_readout, grad_memory, grad_writes, grad_forgetting, q, k, v, decay, eta, strength, basis, sharpness, bias,
    last, last_writes, before, met, met_writes, met_forgetting, position, cu_seqlens, segments, chunks, interval, snr,
    energy,
):  # fmt: skip
    return _room_for_gradients(grad_readout, q, k, v, decay, before, strength, basis, cu_seqlens, interval)


def _room_for_gradients(
    grad_readout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    before: Tensor,
    strength: _Optional,
    basis: _Optional,
    cu_seqlens: _Optional,
    interval: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``_memory_backward`` returns, yet to be filled; rows of chunks that are not there stay zero."""
    (batch, length, heads, key), value = q.shape, v.shape[-1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return decay.new_empty(shape, dtype=dtype)

    return (
        room(batch, length, heads, key, dtype=q.dtype),
        room(batch, length, heads, key, dtype=k.dtype),
        room(batch, length, heads, value, dtype=v.dtype),
        room(batch, length, heads, dtype=decay.dtype),
        decay.new_zeros(before.shape[:2], dtype=torch.float32),
        room(sequences, heads, key, value),
        room(sequences if interval else 0, heads, key, value),
        room(sequences, heads),
        room(sequences if strength is not None else 0, heads),
        room(sequences if basis is not None else 0, heads),
        room(sequences if basis is not None else 0, heads),
    )


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.interval, ctx.snr, ctx.energy, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:3], *output[4:])
    ctx.mark_non_differentiable(*output[4:])
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any,
    grad_readout: _Optional,
    grad_memory: _Optional,
    grad_writes: _Optional,
    grad_forgetting: _Optional,
    *_: Any,
) -> Any:
    q, k, v, decay, eta, memory, writes, forgetting, strength, basis, sharpness, bias, *others = ctx.saved_tensors
    (position, cu_seqlens, segments, chunks), saved = others[:4], others[4:]
    final: list[_Optional] = [grad_memory, grad_writes, grad_forgetting]
    if not ctx.interval:
        final[1:] = None, None
    if any(x is not None for x in final):
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        matrix = (sequences, *q.shape[2:], v.shape[-1])
        shapes = (matrix, matrix, matrix[:2])
        final = [
            saved[0].new_zeros(n, dtype=torch.float32) if x is None else x for x, n in zip(final, shapes, strict=True)
        ]
    grad_q, grad_k, grad_v, grad_decay, grad_eta, *others = _memory_backward(
        grad_readout if grad_readout is not None else torch.zeros_like(v),
        *final,
        *(q, k, v, decay, eta, strength, basis, sharpness, bias, *saved),
        *(position, cu_seqlens, segments, chunks),
        ctx.interval,
        ctx.snr,
        ctx.energy,
    )
    grad_state, (grad_strength, grad_sharpness, grad_bias) = others[:3], others[3:]
    of_state = [None if x is None else grad for x, grad in zip((memory, writes, forgetting), grad_state, strict=True)]
    if not ctx.interval:
        of_state[1:] = None, None
    of_strength = grad_strength.sum(0) if strength is not None else None
    of_resonance = (None, grad_sharpness.sum(0), grad_bias.sum(0)) if basis is not None else (None, None, None)
    grads = (grad_q, grad_k, grad_v, grad_decay, grad_eta.sum(0).to(eta.dtype), *of_state, of_strength, *of_resonance)
    return *grads, *[None] * 8


torch.library.register_autograd("resolvent::memory", _gradient, setup_context=_keep_for_gradient)
