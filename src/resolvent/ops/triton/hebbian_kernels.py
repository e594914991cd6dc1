r"""Triton kernels of the dissipative Hebbian memory over whole sequences (see ``ops.hebbian`` for the mathematics).

A program holds the memory of one head of one sequence in registers and walks over chunks of 64 tokens with it: inside a
chunk a masked ``QKᵀ``, between chunks the state, at the boundaries the consolidation. Its kernels:

* ``sum_decays``: the cumulative decays of every chunk, which the others read.
* ``walk``: reads, writes and consolidates, forwards. For training it leaves the memory before every chunk, and the
  state that met every boundary.
* ``walk_back``: carries the gradient of the memory backwards, and leaves it after every chunk.
* ``chunk_gradients``: with both at hand all chunks are independent, and give the gradients of q, k, v and the decay.
* ``chain``: where few heads meet a long sequence, it is cut into segments that walk at the same time from an empty
  memory: between boundaries the memory is linear in its past. This kernel joins their ends, and the segments walk once
  more from what came before them.
* ``join`` and ``join_back``: the same where memories are consolidated. Segments end at the boundaries, and only from
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

from .consolidation import LOG2_E, PRECISION, consolidate, consolidate_back

_kernel: Any = triton.jit  # what it makes is launched on a grid, which no type of a function allows
VARYING = ["heads"]
"""What differs between models without asking for another kernel; lengths are no arguments at all."""


def sizes_of(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """What every kernel is compiled for: the widths of a head, padded to what products take, and their precision."""
    key, value = q.shape[-1], v.shape[-1]
    padded = (max(16, triton.next_power_of_2(width)) for width in (key, value))
    return dict(
        zip(("K", "V", "BK", "BV"), (key, value, *padded), strict=True), HALF=product_dtype(q, k, v) != torch.float32
    )


def product_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


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
def _segment(segments, segment):
    """Return a row of ``segments.Layout``.

    It has a segment's first token and its last + 1, its first slot and chunk, the chunks since the last boundary, and
    its first boundary.
    """
    row = segments + 6 * segment
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)


@_kernel
def _chunk_tokens(segments, chunks, chunk, C: tl.constexpr):
    """Places of a chunk's tokens, and which of them are there."""
    segment, i = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    start, end, slot, _, _, _ = _segment(segments, segment)
    tokens = slot + i * C + tl.arange(0, C)
    return tokens, (tokens >= start) & (tokens < end)


@_kernel
def cells_of(keys, values, K, V):
    """Places and mask of a (K, V) matrix in memory."""
    return keys[:, None] * V + values[None, :], (keys < K)[:, None] & (values < V)[None, :]


@_kernel
def _decays(high, low, place, C: tl.constexpr, HALF: tl.constexpr):
    """The cumulative decay L of a chunk, as ``sum_decays`` left it: ``exp(-L)``, ``exp(L - L_C)``, and L itself."""
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
def strength_of(strength, head):
    """How strongly a head's SNR filter acts: fully, unless there is a strength."""
    force = 1.0
    if strength is not None:
        force *= tl.load(strength + head).to(tl.float32)
    return force


@_kernel
def resonance_of(basis, sharpness, bias, head, keys, K, BK: tl.constexpr, RESONANCE: tl.constexpr, HALF: tl.constexpr):
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
def load_state(memories, writes, forgetting, row, square, in_square, K, V, CONSOLIDATE: tl.constexpr):
    """Memory, writes and Γ̄ of a row, or their gradients; zeros for the last two without consolidation."""
    memory = tl.load(memories + row * K * V + square, mask=in_square, other=0.0)
    wrote, forgot = tl.zeros_like(memory), 0.0
    if CONSOLIDATE:
        wrote += tl.load(writes + row * K * V + square, mask=in_square, other=0.0)
        forgot += tl.load(forgetting + row)
    return memory, wrote, forgot


@_kernel
def store_state(memories, writes, forgetting, row, square, in_square, K, V, memory, wrote, forgot):
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


@_kernel(do_not_specialize=VARYING)
def sum_decays(
    decay, segments, chunks, high, low, totals, decay_token, decay_head, heads, C: tl.constexpr, HALF: tl.constexpr
):
    """Add up the decays of every chunk, in float64 and into two floats, so that their differences are exact, too.

    They are in bits, for exp2 is an instruction and exp is several; the totals are not.
    """
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


@_kernel(do_not_specialize=VARYING)
def walk(
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
    start, end, slot, chunk, since_boundary, boundary = _segment(segments, segment)
    rate, row = tl.load(eta + head), segment * heads + head
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    square, in_square = cells_of(keys, values, K, V)

    memory, writes, forgetting = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32), 0.0
    if STATE:
        memory, writes, forgetting = load_state(
            initial, initial_writes, initial_forgetting, row, square, in_square, K, V, CONSOLIDATE
        )
    force = strength_of(strength, head)
    modes, steepness, offset = resonance_of(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)

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
                    store_state(
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
        store_state(final, final_writes, final_forgetting, row, square, in_square, K, V, memory, writes, forgetting)
    else:
        tl.store(final + row * K * V + square, memory, mask=in_square)
        tl.store(final_forgetting + row, total_decay)


@_kernel(do_not_specialize=VARYING)
def walk_back(
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
    start, end, slot, chunk, since_boundary, boundary = _segment(segments, segment)
    keys, values, row = tl.arange(0, BK), tl.arange(0, BV), segment * heads + head
    square, in_square = cells_of(keys, values, K, V)

    grad, grad_writes, grad_forgetting = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32), 0.0
    if FINAL:
        grad, grad_writes, grad_forgetting = load_state(
            grad_final, grad_final_writes, grad_final_forgetting, row, square, in_square, K, V, CARRY
        )
    force = strength_of(strength, head)
    modes, steepness, offset = resonance_of(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)
    sum_sharpness, sum_bias, sum_strength = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32), 0.0
    total_decay, along_left = 0.0, 0.0

    q, grad_readout = q + head * q_head, grad_readout + head * V
    count = tl.where(end > start, tl.cdiv(end - slot, C), 0).to(tl.int32)
    if CONSOLIDATE:
        boundary += tl.maximum(end - slot + since_boundary * C, 0) // interval
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
        store_state(
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


@_kernel(do_not_specialize=VARYING)
def chunk_gradients(
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
    square, in_square = cells_of(keys, values, K * there, V)

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


@_kernel(do_not_specialize=["heads", "size"])
def chain(
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
def _boundary_behind(segments, segment, interval, C: tl.constexpr):
    """Whether a boundary lies behind a segment, and which: the only one that it meets."""
    start, end, slot, _, since_boundary, boundary = _segment(segments, segment)
    return (end > start) & ((since_boundary * C + end - slot) % interval == 0), boundary


@_kernel(do_not_specialize=VARYING)
def join(
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
    square, in_square = cells_of(keys, tl.arange(0, BV), K, V)
    memory, writes, forgetting = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32), 0.0
    if STATE:
        memory, writes, forgetting = load_state(
            initial, initial_writes, initial_forgetting, row, square, in_square, K, V, True
        )
    force = strength_of(strength, head)
    modes, steepness, offset = resonance_of(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)

    # The next end is asked for before this one is consolidated: memory is slow, and all wait for this walk.
    written = tl.load(ends + (first * heads + head) * K * V + square, mask=in_square, other=0.0)
    for j in range(0, (stop - first).to(tl.int32)):
        segment = first + j
        place = segment * heads + head
        tl.store(starts + place * K * V + square, memory, mask=in_square)
        following = tl.minimum(segment + 1, stop - 1) * heads + head
        upcoming = tl.load(ends + following * K * V + square, mask=in_square, other=0.0)
        at_boundary, boundary = _boundary_behind(segments, segment, interval, C)
        total = tl.load(decays + place)
        kept = tl.exp(-total)
        memory, writes, forgetting = memory * kept + written, writes * kept + written, forgetting + total
        if at_boundary:
            if SAVE:
                crossed = boundary * heads + head
                store_state(
                    met, met_writes, met_forgetting, crossed, square, in_square, K, V, memory, writes, forgetting
                )
            memory = consolidate(
                memory, writes, forgetting, force, modes, steepness, offset, threshold, temperature, gamma_boost,
                eta_boost, energy, K, V, SNR, RESONANCE,
            )  # fmt: skip
            writes = tl.zeros_like(writes)
            forgetting = 0.0
        written = upcoming

    store_state(final, final_writes, final_forgetting, row, square, in_square, K, V, memory, writes, forgetting)


@_kernel(do_not_specialize=VARYING)
def join_back(
    segments, first_segment, ends, decays, grad_final, grad_final_writes, grad_final_forgetting,
    strength, basis, sharpness, bias, met, met_writes, met_forgetting, left_at_end,
    starts, starts_writes, starts_forgetting, of_left,
    grad_initial, grad_initial_writes, grad_initial_forgetting, grad_strength, grad_sharpness, grad_bias,
    threshold, temperature, gamma_boost, eta_boost, energy, interval, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FINAL: tl.constexpr, SNR: tl.constexpr, RESONANCE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Join the gradients of segments that walked back from nothing (``ends``).

    To each it adds the gradients of those behind it (``starts``), before a boundary that may lie there, and their
    ``of_left`` (see ``walk_back``).
    """
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, stop = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    keys, values, row = tl.arange(0, BK), tl.arange(0, BV), sequence * heads + head
    square, in_square = cells_of(keys, values, K, V)
    grad, grad_writes, grad_forgetting = tl.zeros([BK, BV], tl.float32), tl.zeros([BK, BV], tl.float32), 0.0
    along_left = 0.0
    if FINAL:
        grad, grad_writes, grad_forgetting = load_state(
            grad_final, grad_final_writes, grad_final_forgetting, row, square, in_square, K, V, True
        )
        along_left += tl.sum(grad_writes * tl.load(left_at_end + row * K * V + square, mask=in_square, other=0.0))
    force = strength_of(strength, head)
    modes, steepness, offset = resonance_of(basis, sharpness, bias, head, keys, K, BK, RESONANCE, HALF)
    sum_sharpness, sum_bias, sum_strength = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32), 0.0

    for j in range(0, (stop - first).to(tl.int32)):
        segment = stop - 1 - j
        place = segment * heads + head
        end = tl.load(ends + place * K * V + square, mask=in_square, other=0.0)
        at_boundary, boundary = _boundary_behind(segments, segment, interval, C)
        if at_boundary:
            crossed = boundary * heads + head
            grad, grad_writes, grad_forgetting, a_strength, a_sharpness, a_bias, along_left = consolidate_back(
                grad, met + crossed * K * V, met_writes + crossed * K * V, square, in_square,
                tl.load(met_forgetting + crossed), force, modes, steepness, offset, threshold, temperature,
                gamma_boost, eta_boost, energy, K, V, BK, SNR, strength is not None, RESONANCE,
            )  # fmt: skip
            sum_strength += a_strength
            sum_sharpness += a_sharpness
            sum_bias += a_bias
        store_state(
            starts, starts_writes, starts_forgetting, place, square, in_square, K, V, grad, grad_writes, grad_forgetting
        )
        tl.store(of_left + place, along_left)
        kept = tl.exp(-tl.load(decays + place))
        grad, grad_writes = grad * kept + end, grad_writes * kept

    store_state(
        grad_initial, grad_initial_writes, grad_initial_forgetting, row, square, in_square, K, V, grad, grad_writes,
        grad_forgetting,
    )  # fmt: skip
    _store_sums(
        grad_strength, grad_sharpness, grad_bias, row, sum_strength, sum_sharpness, sum_bias,
        SNR and strength is not None, RESONANCE,
    )  # fmt: skip
