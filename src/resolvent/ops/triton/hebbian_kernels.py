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
C tokens of a chunk. Groups of arguments are those of ``arguments``.
"""

from typing import Any

import triton
import triton.language as tl

from .arguments import Filters, Met, constexpr
from .consolidation import LOG2_E, PRECISION, consolidate_back, filtered, in_units

_kernel: Any = triton.jit  # a kernel is launched on a grid, which no type of a function allows
VARYING = ["heads"]
"""Arguments whose values need no kernel of their own; lengths are no arguments at all."""


# --------------------------------------------------------------------------------------------- what the kernels share


@_kernel
def _tile(pointer, stride, rows, columns, inside, width):
    """Load rows of a tensor whose columns are neighbours, zero outside: [rows, columns]."""
    mask = inside[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@_kernel
def _store_tile(pointer, stride, rows, columns, inside, width, x):
    mask = inside[:, None] & (columns < width)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], x, mask=mask)


@_kernel
def _segment(segments, segment):
    """Load a row of ``segments.Layout``.

    It holds a segment's first token and its last + 1, its first slot and chunk, the chunks since the last boundary, and
    its first boundary.
    """
    row = segments + 6 * segment
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)


@_kernel
def _chunk_tokens(segments, chunks, chunk, C: tl.constexpr):
    """Return the indices of a chunk's tokens, and the mask of those that exist."""
    segment, i = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    start, end, slot, _, _, _ = _segment(segments, segment)
    tokens = slot + i * C + tl.arange(0, C)
    return tokens, (tokens >= start) & (tokens < end)


@_kernel
def cells_of(keys, values, K, V):
    """Return indices and mask of a (K, V) matrix in memory."""
    return keys[:, None] * V + values[None, :], (keys < K)[:, None] & (values < V)[None, :]


@_kernel
def _decays(decays, index, variant: constexpr):
    """Return ``exp(-L)`` and ``exp(L - L_C)`` of a chunk, and the two parts of its cumulative decay L."""
    C: tl.constexpr = variant.C
    slots = index * C + tl.arange(0, C)
    cumulative, total = tl.load(decays.cumulative + slots), tl.load(decays.cumulative + index * C + C - 1)
    rest = tl.zeros_like(cumulative)
    to_end = cumulative - total
    if not variant.HALF:
        rest += tl.load(decays.rest + slots)
        to_end += rest - tl.load(decays.rest + index * C + C - 1)
    return tl.exp2(-cumulative), tl.exp2(to_end), cumulative, rest


@_kernel
def _decay_between(cumulative, rest, variant: constexpr):
    """Return ``exp(L_s - L_t)`` for s <= t, zero elsewhere: [t, s]."""
    C: tl.constexpr = variant.C
    later = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    between = cumulative[None, :] - cumulative[:, None]
    if not variant.HALF:
        between += rest[None, :] - rest[:, None]
    return tl.exp2(tl.where(later, between, float("-inf")))


@_kernel
def strength_of(strength, head):
    """Load the strength of a head's SNR filter; 1 where none is given."""
    of_head = 1.0
    if strength is not None:
        of_head *= tl.load(strength + head).to(tl.float32)
    return of_head


@_kernel
def resonance_of(filters, head, keys, variant: constexpr):
    """Load a head's basis, in the dtype of its products, sharpness and bias; zeros without a resonance."""
    BK: tl.constexpr = variant.BK
    basis, sharpness, bias = tl.zeros([BK, BK], tl.float32), 0.0, 0.0
    if variant.RESONANCE:
        basis += _tile(filters.basis, variant.K, keys, keys, keys < variant.K, variant.K).to(tl.float32)
        sharpness += tl.load(filters.sharpness + head).to(tl.float32)
        bias += tl.load(filters.bias + head).to(tl.float32)
    if variant.HALF:
        basis = basis.to(tl.float16)
    return basis, sharpness, bias


@_kernel
def _filters_of(filters, head, keys, variant: constexpr):
    """Load the filters of a head."""
    strength = strength_of(filters.strength, head)
    basis, sharpness, bias = resonance_of(filters, head, keys, variant)
    return Filters(strength, basis, sharpness, bias)


@_kernel
def _is_boundary(since_boundary, chunk_end, end, interval, C: tl.constexpr):
    """Return True if a boundary lies behind a chunk that is the ``since_boundary``-th since the last one."""
    return (since_boundary * C % interval == 0) & (chunk_end <= end)


@_kernel
def _no_state(variant: constexpr):
    """Return an empty memory and no forgetting, or gradients of zero."""
    BK: tl.constexpr = variant.BK
    BV: tl.constexpr = variant.BV
    return tl.zeros([BK, BV], tl.float32), 0.0


@_kernel
def load_state(state, row, square, in_square, variant: constexpr, ALL: tl.constexpr):
    """Load the state of a row, or its gradient; zero for Γ̄ unless ``ALL`` of it is asked for."""
    KV: tl.constexpr = variant.K * variant.V
    memory, forgetting = tl.load(state.memory + row * KV + square, mask=in_square, other=0.0), 0.0
    if ALL:
        forgetting += tl.load(state.forgetting + row)
    return memory, forgetting


@_kernel
def store_state(state, row, square, in_square, variant: constexpr, memory, forgetting):
    """Store the state of a row, or its gradient."""
    KV: tl.constexpr = variant.K * variant.V
    tl.store(state.memory + row * KV + square, memory, mask=in_square)
    tl.store(state.forgetting + row, forgetting)


@_kernel
def _store_sums(grads, row, strength, sharpness, bias, STRENGTH: tl.constexpr, variant: constexpr):
    """Store the gradients of a head's strength and, still by mode, of its sharpness and bias."""
    if STRENGTH:
        tl.store(grads.strength + row, strength)
    if variant.RESONANCE:
        tl.store(grads.sharpness + row, tl.sum(sharpness))
        tl.store(grads.bias + row, tl.sum(bias))


@_kernel
def _load_met(met, row, there, square, in_square, variant: constexpr):
    """Load the state of a row that met a boundary; zeros if it is not ``there``.

    This is done long before it is needed: memory is slow, and everything waits for a walk.
    """
    KV: tl.constexpr = variant.K * variant.V
    inside = in_square & (square < tl.where(there, KV, 0))
    unit = tl.load(met.unit + row * KV + square, mask=inside, other=0.0)
    rms = tl.load(met.rms + row, mask=there, other=0.0)
    return Met(unit, rms, tl.load(met.forgetting + row, mask=there, other=0.0))


@_kernel
def _meet_boundary(memory, forgetting, met, row, square, in_square, filters, constants, variant: constexpr):
    """Return the consolidated memory; leave the state that met the boundary, unless ``met`` is None."""
    unit, rms = in_units(memory, variant)
    if met.unit is not None:
        of_head = met.unit + row * (variant.K * variant.V)
        tl.store(of_head + square, unit.to(met.unit.dtype.element_ty), mask=in_square)
        tl.store(met.rms + row, rms)
        tl.store(met.forgetting + row, forgetting)
    return filtered(unit, forgetting, filters, constants, variant) * rms


# -------------------------------------------------------------------------------------------------------- the kernels


@_kernel(do_not_specialize=VARYING)
def sum_decays(
    decay, decay_token, decay_head, segments, chunks, decays, heads, C: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Sum up the decays of every chunk, in float64 and into two floats, so that their differences are exact, too.

    The cumulative decays are in bits: exp2 is one instruction, exp is several. The totals are not.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tokens, inside = _chunk_tokens(segments, chunks, chunk, C)
    of_tokens = tl.load(decay + head * decay_head + tokens * decay_token, mask=inside, other=0.0).to(tl.float64)
    index = chunk * heads + head
    tl.store(decays.total + index, tl.sum(of_tokens, 0).to(tl.float32))
    # After a decay of 40, float32 holds nothing of a memory; smaller sums keep more digits.
    cumulative = tl.cumsum(tl.minimum(of_tokens, 40.0), 0) * LOG2_E
    rounded, slots = cumulative.to(tl.float32), index * C + tl.arange(0, C)
    tl.store(decays.cumulative + slots, rounded)
    if not HALF:
        tl.store(decays.rest + slots, (cumulative - rounded.to(tl.float64)).to(tl.float32))


@_kernel(do_not_specialize=VARYING)
def walk(
    tokens, decays, eta, segments, start, filters, readout, final, before, met, strides, constants, heads,
    variant: constexpr,
):  # fmt: skip
    """Walk over a segment with the memory of a head.

    ``readout``, ``before`` and the fields of ``start`` and ``met`` may be None. Without consolidation the final Γ̄ is
    the total decay of the segment.
    """
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    CONSOLIDATE: tl.constexpr = variant.SNR or variant.RESONANCE
    K: tl.constexpr = variant.K
    V: tl.constexpr = variant.V
    C: tl.constexpr = variant.C
    first, end, slot, chunk, since_boundary, boundary = _segment(segments, segment)
    eta_of_head, row = tl.load(eta + head), segment * heads + head
    keys, values = tl.arange(0, variant.BK), tl.arange(0, variant.BV)
    square, in_square = cells_of(keys, values, K, V)

    # 1. The state that the segment starts from, and the filters of the head.
    memory, forgetting = _no_state(variant)
    if start.memory is not None:
        memory, forgetting = load_state(start, row, square, in_square, variant, CONSOLIDATE)
    of_head = _filters_of(filters, head, keys, variant)

    q, k, v = tokens.q + head * strides.q_head, tokens.k + head * strides.k_head, tokens.v + head * strides.v_head
    segment_total = 0.0
    for i in range(0, tl.where(end > first, tl.cdiv(end - slot, C), 0).to(tl.int32)):
        # 2. Load a chunk and its decays.
        rows = slot + i * C + tl.arange(0, C)
        inside = (rows >= first) & (rows < end)
        key = _tile(k, strides.k_token, rows, keys, inside, K)
        value = _tile(v, strides.v_token, rows, values, inside, V)
        index = (chunk + i) * heads + head
        from_start, to_end, cumulative, rest = _decays(decays, index, variant)
        total = tl.load(decays.total + index)
        if before is not None:
            tl.store(before + index * K * V + square, memory.to(before.dtype.element_ty), mask=in_square)
        # 3. Read: within the chunk a masked QKᵀ, before it the memory.
        if readout is not None:
            query = _tile(q, strides.q_token, rows, keys, inside, K)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            scores = scores * _decay_between(cumulative, rest, variant) * eta_of_head
            out = tl.dot(query, memory.to(query.dtype), input_precision=PRECISION) * from_start[:, None]
            out = tl.dot(scores.to(value.dtype), value, out, input_precision=PRECISION)
            _store_tile(readout + head * V, heads * V, rows, values, inside, V, out.to(readout.dtype.element_ty))
        # 4. Write the chunk into the memory.
        key = (key * (eta_of_head * to_end)[:, None]).to(value.dtype)
        memory = tl.dot(tl.trans(key), value, memory * tl.exp(-total), input_precision=PRECISION)
        segment_total += total
        # 5. Consolidate at a boundary.
        if CONSOLIDATE:
            forgetting += total
            if _is_boundary(since_boundary + i + 1, slot + (i + 1) * C, end, constants.interval, C):
                row_met = boundary * heads + head
                memory = _meet_boundary(
                    memory, forgetting, met, row_met, square, in_square, of_head, constants, variant
                )
                boundary += 1
                forgetting = 0.0

    # 6. The state that the segment leaves.
    if CONSOLIDATE:
        store_state(final, row, square, in_square, variant, memory, forgetting)
    else:
        tl.store(final.memory + row * K * V + square, memory, mask=in_square)
        tl.store(final.forgetting + row, segment_total)


@_kernel(do_not_specialize=VARYING)
def walk_back(
    q, decays, segments, grad_readout, grad_final, filters, saved, met, grads, strides, constants, heads,
    variant: constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk back over a segment with the gradient of the memory of a head.

    ``saved`` holds the memory before every chunk, and receives after every chunk the gradient of what the chunk wrote,
    and of its total decay as far as it acts on the memory; its fields may be None. The gradient of Γ̄ is carried where
    the segment consolidates or ``grad_final`` has one; elsewhere the gradient of the initial Γ̄ is the total decay of
    the segment.
    """
    segment, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    CONSOLIDATE: tl.constexpr = variant.SNR or variant.RESONANCE
    CARRY: constexpr = CONSOLIDATE or grad_final.forgetting is not None
    STRENGTH: constexpr = variant.SNR and filters.strength is not None
    BK: tl.constexpr = variant.BK
    K: tl.constexpr = variant.K
    V: tl.constexpr = variant.V
    C: tl.constexpr = variant.C
    before, grad_written, grad_total = saved
    first, end, slot, chunk, since_boundary, boundary = _segment(segments, segment)
    keys, values, row = tl.arange(0, variant.BK), tl.arange(0, variant.BV), segment * heads + head
    square, in_square = cells_of(keys, values, K, V)

    # 1. The gradient behind the segment, and the filters of the head.
    grad, grad_forgetting = _no_state(variant)
    if grad_final.memory is not None:
        grad, grad_forgetting = load_state(grad_final, row, square, in_square, variant, CARRY)
    of_head = _filters_of(filters, head, keys, variant)
    sum_strength, sum_sharpness, sum_bias = 0.0, tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    segment_total = 0.0

    q, grad_readout = q + head * strides.q_head, grad_readout + head * V
    count = tl.where(end > first, tl.cdiv(end - slot, C), 0).to(tl.int32)
    if CONSOLIDATE:
        first_boundary = boundary
        boundary += tl.maximum(end - slot + since_boundary * C, 0) // constants.interval
        row_met = (boundary - 1) * heads + head
        of_boundary = _load_met(met, row_met, boundary > first_boundary, square, in_square, variant)
    for j in tl.range(0, count, num_stages=STAGES):
        # 2. Load a chunk, the gradient of its read-out and its decays, from the last chunk on.
        i = count - 1 - j
        rows = slot + i * C + tl.arange(0, C)
        inside = (rows >= first) & (rows < end)
        query = _tile(q, strides.q_token, rows, keys, inside, K)
        upstream = _tile(grad_readout, heads * V, rows, values, inside, V)
        index = (chunk + i) * heads + head
        from_start, _, _, _ = _decays(decays, index, variant)
        total = tl.load(decays.total + index)
        kept = tl.exp(-total)
        segment_total += total
        if before is not None:
            memory = tl.load(before + index * K * V + square, mask=in_square, other=0.0).to(tl.float32)
        # 3. Back through a boundary; where nothing reads the final state, not through one behind the last token.
        if CONSOLIDATE:
            passed = _is_boundary(since_boundary + i + 1, slot + (i + 1) * C, end, constants.interval, C)
            if passed & ((j > 0) | (grad_final.memory is not None)):
                of_state, of_strength, of_sharpness, of_bias = consolidate_back(
                    grad, of_boundary, of_head, constants, variant, STRENGTH
                )
                grad, grad_forgetting = of_state
                sum_strength += of_strength
                sum_sharpness += of_sharpness
                sum_bias += of_bias
            if passed:
                boundary -= 1
                row_met = (boundary - 1) * heads + head
                of_boundary = _load_met(met, row_met, boundary > first_boundary, square, in_square, variant)
        # 4. The gradients of what the chunk wrote, and of its total decay.
        if before is not None:
            tl.store(grad_written + index * K * V + square, grad.to(query.dtype), mask=in_square)
            tl.store(grad_total + index, grad_forgetting - kept * tl.sum(grad * memory))
        # 5. Back to before the chunk, which reads the memory.
        query = (query * from_start[:, None]).to(query.dtype)
        grad = tl.dot(tl.trans(query), upstream, grad * kept, input_precision=PRECISION)

    # 6. The gradients of the state that the segment started from, and those of the filters.
    if CARRY:
        store_state(grads.state, row, square, in_square, variant, grad, grad_forgetting)
    else:
        tl.store(grads.state.memory + row * K * V + square, grad, mask=in_square)
        tl.store(grads.state.forgetting + row, segment_total)
    _store_sums(grads.filters, row, sum_strength, sum_sharpness, sum_bias, STRENGTH, variant)


@_kernel(do_not_specialize=VARYING)
def chunk_gradients(
    tokens, decays, eta, segments, chunks, grad_readout, saved, grads, grad_decay, grad_eta, strides, heads,
    variant: constexpr,
):  # fmt: skip
    """Compute the gradients of the tokens of a chunk.

    ``saved`` is that of ``walk_back``: the memory before the chunk, and the gradients of what it wrote.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    K: tl.constexpr = variant.K
    V: tl.constexpr = variant.V
    C: tl.constexpr = variant.C
    before, grad_written, grad_total = saved
    rows, inside = _chunk_tokens(segments, chunks, chunk, C)
    eta_of_head, index = tl.load(eta + head), chunk * heads + head
    keys, values = tl.arange(0, variant.BK), tl.arange(0, variant.BV)
    there = tl.max(inside.to(tl.int32), 0)  # a row without a token has nothing to read
    square, in_square = cells_of(keys, values, K * there, V)

    query = _tile(tokens.q + head * strides.q_head, strides.q_token, rows, keys, inside, K)
    key = _tile(tokens.k + head * strides.k_head, strides.k_token, rows, keys, inside, K)
    value = _tile(tokens.v + head * strides.v_head, strides.v_token, rows, values, inside, V)
    upstream = _tile(grad_readout + head * V, heads * V, rows, values, inside, V)
    from_start, to_end, cumulative, rest = _decays(decays, index, variant)
    memory = tl.load(before + index * K * V + square, mask=in_square, other=0.0).to(query.dtype)
    of_written = tl.load(grad_written + index * K * V + square, mask=in_square, other=0.0)

    # 1. Within the chunk. A token's own term does not depend on the decay: left out, it costs the others no digits.
    between = _decay_between(cumulative, rest, variant) * eta_of_head
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    score_grad = tl.dot(upstream, tl.trans(value), input_precision=PRECISION) * between
    earlier = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
    exponents = tl.where(earlier, score_grad * scores, 0.0)
    of_cumulative = tl.sum(exponents, 0) - tl.sum(exponents, 1)
    scores = (scores * between).to(value.dtype)
    score_grad = score_grad.to(value.dtype)

    # 2. And through the memory.
    scaled_key = (key * (eta_of_head * to_end)[:, None]).to(value.dtype)
    value_grad = tl.dot(scaled_key, of_written, input_precision=PRECISION)
    value_grad = tl.dot(tl.trans(scores), upstream, value_grad, input_precision=PRECISION)
    _store_tile(grads.v + head * V, heads * V, rows, values, inside, V, value_grad.to(grads.v.dtype.element_ty))

    query_grad = tl.dot(upstream, tl.trans(memory), input_precision=PRECISION) * from_start[:, None]
    of_cumulative -= tl.sum(query_grad * query, 1)
    query_grad = tl.dot(score_grad, key, query_grad, input_precision=PRECISION)
    _store_tile(grads.q + head * K, heads * K, rows, keys, inside, K, query_grad.to(grads.q.dtype.element_ty))

    key_grad = tl.dot(value, tl.trans(of_written), input_precision=PRECISION) * (eta_of_head * to_end)[:, None]
    from_keys = tl.sum(key_grad * key, 1)
    of_cumulative += from_keys
    key_grad = tl.dot(tl.trans(score_grad), query, key_grad, input_precision=PRECISION)
    _store_tile(grads.k + head * K, heads * K, rows, keys, inside, K, key_grad.to(grads.k.dtype.element_ty))
    # An η that has underflown is out of reach: its logarithm has a gradient of zero.
    tl.store(grad_eta + index, tl.where(eta_of_head > 0, tl.sum(key_grad * key) / eta_of_head, 0.0))

    # 3. The decay of a token acts on all cumulative decays from it on.
    of_total = tl.load(grad_total + index) - tl.sum(from_keys)
    of_decay = tl.cumsum(of_cumulative, 0, reverse=True) + of_total
    tl.store(grad_decay + rows * heads + head, of_decay, mask=inside)


@_kernel(do_not_specialize=["heads", "size"])
def chain(ends, totals, first_segment, start, starts, last, heads, size, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Join segments that walked from an empty memory: compute the memory before each of them, and at the end."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cells = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < size
    first, stop = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    row = (sequence * heads + head) * size + cells
    memory = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        memory += tl.load(start + row, mask=inside, other=0.0)
    for j in range(0, (stop - first).to(tl.int32)):
        segment = tl.where(REVERSE, stop - 1 - j, first + j) * heads + head
        tl.store(starts + segment * size + cells, memory, mask=inside)
        end = tl.load(ends + segment * size + cells, mask=inside, other=0.0)
        memory = tl.exp(-tl.load(totals + segment)) * memory + end
    tl.store(last + row, memory, mask=inside)


@_kernel
def _segment_end(segments, segment, ends, totals, head, heads, square, in_square, constants, variant: constexpr):
    """Load what a segment leaves behind: its memory, or the gradient of it, and its total decay.

    Returns also whether a boundary lies behind the segment, which meets no other one, and the index of the boundary.
    """
    first, end, slot, _, since_boundary, boundary = _segment(segments, segment)
    at_boundary = (end > first) & ((since_boundary * variant.C + end - slot) % constants.interval == 0)
    row = segment * heads + head
    memory = tl.load(ends + row * (variant.K * variant.V) + square, mask=in_square, other=0.0)
    return memory, tl.load(totals + row), at_boundary, boundary


@_kernel(do_not_specialize=VARYING)
def join(
    ends, totals, segments, first_segment, start, filters, starts, final, met, constants, heads, variant: constexpr
):  # fmt: skip
    """Join segments that walked from an empty memory, consolidating at boundaries: compute the memory before each.

    The fields of ``start`` and ``met`` may be None.
    """
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    KV: tl.constexpr = variant.K * variant.V
    first, stop = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    keys, row = tl.arange(0, variant.BK), sequence * heads + head
    square, in_square = cells_of(keys, tl.arange(0, variant.BV), variant.K, variant.V)
    memory, forgetting = _no_state(variant)
    if start.memory is not None:
        memory, forgetting = load_state(start, row, square, in_square, variant, True)
    of_head = _filters_of(filters, head, keys, variant)

    # Load the next end before this one is consolidated: memory is slow, and everything waits for this walk.
    upcoming = _segment_end(segments, first, ends, totals, head, heads, square, in_square, constants, variant)
    for j in range(0, (stop - first).to(tl.int32)):
        segment = first + j
        written, total, at_boundary, boundary = upcoming
        following = tl.minimum(segment + 1, stop - 1)
        upcoming = _segment_end(segments, following, ends, totals, head, heads, square, in_square, constants, variant)
        tl.store(starts + (segment * heads + head) * KV + square, memory, mask=in_square)
        memory, forgetting = memory * tl.exp(-total) + written, forgetting + total
        if at_boundary:
            row_met = boundary * heads + head
            memory = _meet_boundary(memory, forgetting, met, row_met, square, in_square, of_head, constants, variant)
            forgetting = 0.0

    store_state(final, row, square, in_square, variant, memory, forgetting)


@_kernel(do_not_specialize=VARYING)
def join_back(
    segments, first_segment, ends, totals, grad_final, filters, met, behind, grads, constants, heads,
    variant: constexpr,
):  # fmt: skip
    """Join the gradients of segments that walked back from zero (``ends``).

    Computes the gradients ``behind`` each of them, before a boundary that may lie there, for ``walk_back``.
    """
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    STRENGTH: constexpr = variant.SNR and filters.strength is not None
    BK: tl.constexpr = variant.BK
    first, stop = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    keys, values, row = tl.arange(0, variant.BK), tl.arange(0, variant.BV), sequence * heads + head
    square, in_square = cells_of(keys, values, variant.K, variant.V)
    grad, grad_forgetting = _no_state(variant)
    if grad_final.memory is not None:
        grad, grad_forgetting = load_state(grad_final, row, square, in_square, variant, True)
    of_head = _filters_of(filters, head, keys, variant)
    sum_strength, sum_sharpness, sum_bias = 0.0, tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)

    # Load what the segment before needs before this one is passed, as in ``join``.
    last = stop - 1
    upcoming = _segment_end(segments, last, ends, totals, head, heads, square, in_square, constants, variant)
    upcoming_met = _load_met(met, upcoming[3] * heads + head, upcoming[2], square, in_square, variant)
    for j in range(0, (stop - first).to(tl.int32)):
        segment = last - j
        end, total, at_boundary, _ = upcoming
        of_boundary = upcoming_met
        before = tl.maximum(segment - 1, first)
        upcoming = _segment_end(segments, before, ends, totals, head, heads, square, in_square, constants, variant)
        upcoming_met = _load_met(met, upcoming[3] * heads + head, upcoming[2], square, in_square, variant)
        # Where nothing reads the final state, no gradient comes from behind the last boundary.
        if at_boundary & ((j > 0) | (grad_final.memory is not None)):
            of_state, of_strength, of_sharpness, of_bias = consolidate_back(
                grad, of_boundary, of_head, constants, variant, STRENGTH
            )
            grad, grad_forgetting = of_state
            sum_strength += of_strength
            sum_sharpness += of_sharpness
            sum_bias += of_bias
        store_state(behind, segment * heads + head, square, in_square, variant, grad, grad_forgetting)
        grad = grad * tl.exp(-total) + end

    store_state(grads.state, row, square, in_square, variant, grad, grad_forgetting)
    _store_sums(grads.filters, row, sum_strength, sum_sharpness, sum_bias, STRENGTH, variant)
