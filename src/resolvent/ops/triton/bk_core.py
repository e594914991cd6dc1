r"""Triton kernels of the BK-Core (see ``ops.bk_core`` for the mathematics), forward and backward.

Forwards, a block of sites acts on the g that arrives at it as the product of its Möbius matrices, up to a factor.
Relative errors are near 1e-7 for ``ζ >= 0.1``, near 2e-6 for ``ζ = 0.01`` and 2e-5 for ``ζ = 0.001``: what float32
holds of a chain that resonates. Backwards, what arrives is the adjoint, and a block acts as the product of the affine
maps ``x -> conj(m g_i^2) (gbar_i + x)``: at the end of a chain arrives the gradient of its final state, at its start
leaves that of its initial state.

A program holds one chain, or one segment of it, and walks over it in blocks of ``lanes * SITES`` sites. In a block

* every lane folds SITES consecutive sites (the first lane: together with what arrives at the block);
* a scan over the lanes makes of that what leaves every lane, which is what arrives at the next one;
* from there each lane steps through its sites once more, exactly as the recurrence is written.

Where there are too few chains to fill the device, chains are cut into segments, and a first launch of the same kernel
with ``FOLD`` reduces every segment to its map. The sums behind the gradient of the coupling are one a program and are
added up by torch, in an order that does not change.

Shapes: B batch, N sequence, H heads, S sequences (B, or those which ``cu_seqlens`` packs). Complex numbers are pairs of
float32, their real and imaginary parts, in a last dimension of two.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..library import operator
from ..packed import count_sequences
from .launch import contiguous

SITES = 8
"""Consecutive sites that a lane holds in a block, unrolled so that all of them are loaded at once."""

MIN_LANES, MAX_LANES = 32, 1024
FEW_BLOCKS = 4
"""Most blocks of a chain that is not cut: a second launch costs as much as walking over them."""

ENOUGH_PROGRAMS = 512
"""Programs that fill a large device several times over."""


def _allocate(
    alpha: Tensor, coupling: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """Allocate the results of ``causal_diagonal``."""
    sequences = count_sequences(alpha.shape[0], cu_seqlens)
    g = torch.empty_like(alpha, memory_format=torch.contiguous_format)
    return g, alpha.new_empty(sequences, *alpha.shape[2:])


@operator("causal_diagonal", _allocate)
def causal_diagonal(
    alpha: Tensor, coupling: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """Compute ``g_i = 1 / (alpha_i - m g_{i-1})`` along every chain, in real tensors.

    Args:
        alpha: float32 (B, N, H, 2).
        coupling: m, float32 (H,).
        state: ``g_{-1}``, float32 (S, H, 2); zero if None.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), on any device; needs B = 1. On the CPU they let the
            launch fit the longest sequence.
        block_size: most lanes of a program, rounded down to a power of two; each holds ``SITES`` sites of a block.

    Returns:
        g (B, N, H, 2) and its last value in every sequence (S, H, 2).
    """
    alpha, coupling = alpha.contiguous(), coupling.contiguous()
    plan = _plan(alpha, cu_seqlens, block_size)
    g, final_state = torch.empty_like(alpha), alpha.new_empty(plan.sequences, *alpha.shape[2:])
    maps = alpha.new_empty(plan.programs, 8)
    arguments = (alpha, coupling, contiguous(state), plan.offsets, maps, g, final_state)
    count_run("resolvent_diagonal", "triton")
    _launch(_forward_kernel, plan, alpha, arguments)
    return g, final_state


def _allocate_gradients(
    grad: Tensor,
    grad_final: Tensor | None,
    g: Tensor,
    coupling: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of ``causal_diagonal_backward``."""
    sequences = count_sequences(g.shape[0], cu_seqlens)
    return torch.empty_like(g), torch.empty_like(coupling), g.new_empty(sequences, *g.shape[2:])


@operator("causal_diagonal_backward", _allocate_gradients)
def causal_diagonal_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    g: Tensor,
    coupling: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of alpha (B, N, H, 2), coupling (H,) and state (S, H, 2), from those of both results."""
    coupling = coupling.contiguous()
    plan = _plan(g, cu_seqlens, block_size)
    grad_alpha, grad_state = torch.empty_like(g), g.new_empty(plan.sequences, *g.shape[2:])
    sums = g.new_empty(plan.sequences, plan.segments, plan.heads)
    maps = g.new_empty(plan.programs, 4)
    arguments = (grad.contiguous(), contiguous(grad_final), g, coupling, contiguous(state), plan.offsets, maps)
    _launch(_backward_kernel, plan, g, (*arguments, _Gradients(grad_alpha, grad_state, sums)))
    return grad_alpha, sums.sum((0, 1)), grad_state


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, coupling, state, cu_seqlens, ctx.block_size = inputs
    ctx.save_for_backward(output[0], coupling, state, cu_seqlens)
    ctx.set_materialize_grads(False)  # an unused final state costs nothing


def _backward(ctx: Any, grad: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    g, coupling, state, cu_seqlens = ctx.saved_tensors
    grad = torch.zeros_like(g) if grad is None else grad
    grad_alpha, grad_coupling, grad_state = causal_diagonal_backward(
        grad, grad_final, g, coupling, state, cu_seqlens, ctx.block_size
    )
    return grad_alpha, grad_coupling, None if state is None else grad_state, None, None


torch.library.register_autograd("resolvent::causal_diagonal", _backward, setup_context=_save)


class _Gradients(NamedTuple):
    """Gradients of alpha (B, N, H, 2) and of the initial state (S, H, 2), and the coupling's by program."""

    alpha: Tensor
    state: Tensor
    sums: Tensor


class _Plan(NamedTuple):
    """Layout of chains on programs.

    Attributes:
        offsets: of packed sequences, on the device of the kernel; None for a rectangle.
        length: N, the sites of a chain of the rectangle.
        sequences, segments, heads: of the grid, heads innermost.
        span: sites of a segment, a multiple of a block.
        lanes: of a program.
    """

    offsets: Tensor | None
    length: int
    sequences: int
    segments: int
    heads: int
    span: int
    lanes: int

    @property
    def programs(self) -> int:
        return self.sequences * self.segments * self.heads


def _plan(chains: Tensor, cu_seqlens: Tensor | None, block_size: int) -> _Plan:
    """Lay out chains (B, N, H, 2)."""
    sequences, length, heads, _ = chains.shape
    longest = length
    if cu_seqlens is not None:
        sequences = len(cu_seqlens) - 1
        if cu_seqlens.device.type == "cpu":  # reading lengths on a device would stall the queue
            longest = max(cu_seqlens.diff().tolist(), default=0)
        cu_seqlens = cu_seqlens.to(chains.device, torch.int64, non_blocking=True).contiguous()

    widest = min(MAX_LANES, 1 << (block_size.bit_length() - 1))
    lanes = min(widest, max(MIN_LANES, triton.next_power_of_2(triton.cdiv(longest, SITES))))
    block = lanes * SITES
    segments = 1
    if longest > FEW_BLOCKS * block:
        fair_share = triton.cdiv(chains.shape[0] * length * heads, ENOUGH_PROGRAMS)
        segments = min(lanes, triton.cdiv(longest, max(block, fair_share)))
    span = max(block, triton.cdiv(triton.cdiv(longest, segments), block) * block)
    return _Plan(cu_seqlens, length, sequences, max(1, triton.cdiv(longest, span)), heads, span, lanes)


def _launch(kernel: Any, plan: _Plan, chains: Tensor, arguments: tuple[Any, ...]) -> None:
    if plan.programs == 0:
        return
    sizes = (plan.length, plan.heads, plan.segments, plan.span)
    with torch.cuda.device_of(chains):
        for fold in (True, False) if plan.segments > 1 else (False,):
            kernel[(plan.programs,)](*arguments, *sizes, plan.lanes, SITES, fold, num_warps=triton.cdiv(plan.lanes, 32))


# In the kernels a complex number is a tuple of its real and its imaginary part.


@triton.jit
def _plus(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def _times(a, b):
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


@triton.jit
def _scaled(m, a):
    return m * a[0], m * a[1]


@triton.jit
def _squared_conj(a):
    return a[0] * a[0] - a[1] * a[1], -2.0 * a[0] * a[1]


@triton.jit
def _size(a):
    return tl.maximum(tl.abs(a[0]), tl.abs(a[1]))


@triton.jit
def _inverse_power(x):
    """Return the power of two that brings x between 1 and 2: a scale that rounds nothing."""
    return (0x7F000000 - (x.to(tl.int32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(a):
    scale = _inverse_power(_size(a))  # the squares of numbers from 1e-30 to 1e30 leave the range of float32
    re, im = a[0] * scale, a[1] * scale
    factor = scale / (re * re + im * im)
    return re * factor, -im * factor


@triton.jit
def _choose(condition, a, b):
    return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1])


@triton.jit
def _pick(chosen, a):
    """Return the one element that is chosen."""
    return tl.sum(tl.where(chosen, a[0], 0.0), 0), tl.sum(tl.where(chosen, a[1], 0.0), 0)


@triton.jit
def _load(pointer, index, mask, other):
    re = tl.load(pointer + 2 * index, mask=mask, other=other)
    im = tl.load(pointer + 2 * index + 1, mask=mask, other=other)
    return re, im


@triton.jit
def _store(pointer, index, a):
    tl.store(pointer + 2 * index, a[0])
    tl.store(pointer + 2 * index + 1, a[1])


@triton.jit
def _pointers(pointer, site, stride):
    """Return pointers to the two parts of every lane's number at its site."""
    return pointer + (2 * site * stride)[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def _load_row(pointer, site, stride, left, other, SITES: tl.constexpr):
    """Load SITES numbers from ``site`` on for every lane, all at once: their latencies overlap."""
    pointers, row = _pointers(pointer, site, stride), ()
    for i in tl.static_range(SITES):
        pair = tl.load(pointers + 2 * i * stride, mask=(site + i < left)[:, None], other=other)
        row = row + (tl.split(pair),)  # noqa: RUF005 (Triton has no starred tuples)
    return row


@triton.jit
def _load_optional(pointer, index):
    """Load a number; zero without a pointer."""
    value = (tl.zeros((), tl.float32), tl.zeros((), tl.float32))
    if pointer is not None:
        value = _load(pointer, index, None, None)
    return value


@triton.jit
def _of_lane_before(a, lane, first):
    """Return the number of the lane before; ``first`` for the first lane."""
    before = tl.maximum(lane - 1, 0)
    return _choose(lane == 0, first, (tl.gather(a[0], before, 0), tl.gather(a[1], before, 0)))


@triton.jit
def _next(m, alpha, g):
    return reciprocal((alpha[0] - m * g[0], alpha[1] - m * g[1]))


@triton.jit
def _rescaled(a, b, c, d):
    """Scale a matrix (a, b; c, d): a factor does not change its map, but it overflows."""
    ab = tl.maximum(_size(a), _size(b))
    scale = _inverse_power(tl.maximum(ab, tl.maximum(_size(c), _size(d))))
    return _scaled(scale, a), _scaled(scale, b), _scaled(scale, c), _scaled(scale, d)


@triton.jit
def _append(m, alpha, a, b, c, d):
    """Return the matrix of a block (a, b; c, d) and one more site, (0, 1; -m, alpha) times it."""
    return _rescaled(c, d, _plus(_times(alpha, c), _scaled(-m, a)), _plus(_times(alpha, d), _scaled(-m, b)))


@triton.jit
def _join(
    a1_re, a1_im, b1_re, b1_im, c1_re, c1_im, d1_re, d1_im, a2_re, a2_im, b2_re, b2_im, c2_re, c2_im, d2_re, d2_im
):  # fmt: skip
    """Return the matrix of a block and the next one together."""
    a1, b1, c1, d1 = (a1_re, a1_im), (b1_re, b1_im), (c1_re, c1_im), (d1_re, d1_im)
    a2, b2, c2, d2 = (a2_re, a2_im), (b2_re, b2_im), (c2_re, c2_im), (d2_re, d2_im)
    a, b = _plus(_times(a2, a1), _times(b2, c1)), _plus(_times(a2, b1), _times(b2, d1))
    c, d = _plus(_times(c2, a1), _times(d2, c1)), _plus(_times(c2, b1), _times(d2, d1))
    a, b, c, d = _rescaled(a, b, c, d)
    return a + b + c + d


@triton.jit
def _scan_matrices(a, b, c, d):
    a_re, a_im, b_re, b_im, c_re, c_im, d_re, d_im = tl.associative_scan(a + b + c + d, 0, _join)
    return (a_re, a_im), (b_re, b_im), (c_re, c_im), (d_re, d_im)


@triton.jit
def _join_affine(a1_re, a1_im, b1_re, b1_im, a2_re, a2_im, b2_re, b2_im):
    """Return the map ``x -> a x + b`` of a block and the next one together."""
    a2 = (a2_re, a2_im)
    return _times(a2, (a1_re, a1_im)) + _plus(_times(a2, (b1_re, b1_im)), (b2_re, b2_im))


@triton.jit
def _scan_affine(a, b):
    a_re, a_im, b_re, b_im = tl.associative_scan(a + b, 0, _join_affine)
    return (a_re, a_im), (b_re, b_im)


@triton.jit
def _chain(cu_seqlens, length, heads, segments):
    """Return head, sequence and segment of this program, and the first row and the number of sites of its chain."""
    program = tl.program_id(0).to(tl.int64)
    sequence = program // heads // segments
    if cu_seqlens is None:
        start, count = sequence * length, tl.zeros((), tl.int64) + length
    else:
        start = tl.load(cu_seqlens + sequence)
        count = tl.load(cu_seqlens + sequence + 1) - start
    return program % heads, sequence, program // heads % segments, start, count


@triton.jit(do_not_specialize=["length", "heads", "segments", "span"])
def _forward_kernel(
    alpha,
    coupling,
    state,
    cu_seqlens,
    maps,
    g,
    final_state,
    length,
    heads,
    segments,
    span,
    LANES: tl.constexpr,
    SITES: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Compute g of a segment from the g that arrives at it; with FOLD the segment's matrix instead, (a, b; c, d)."""
    head, sequence, segment, start, count = _chain(cu_seqlens, length, heads, segments)
    m = tl.load(coupling + head)
    alpha += 2 * (start * heads + head)
    g += 2 * (start * heads + head)
    maps += 8 * tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    site = lane * SITES  # the lane's first in a block
    zero, one = tl.zeros((), tl.float32), tl.full((), 1.0, tl.float32)

    # The matrix of all sites before. A number that arrives from there is b / d, what becomes of zero.
    a0, b0, c0, d0 = (one, zero), (zero, zero), (zero, zero), (one, zero)
    if not FOLD:
        b0 = _load_optional(state, sequence * heads + head)
        if segment > 0:
            earlier = (lane > 0) & (lane <= segment)
            matrix = 4 * heads * (lane - 1 - segment)
            a, b = _load(maps, matrix, earlier, 1.0), _load(maps, matrix + 1, earlier, 0.0)
            c, d = _load(maps, matrix + 2, earlier, 0.0), _load(maps, matrix + 3, earlier, 1.0)
            _, b, _, d = _scan_matrices(a, _choose(lane == 0, _times(d, b0), b), c, d)
            b0 = _pick(lane == segment, _times(b, reciprocal(d)))

    for block in range(segment * span, tl.minimum((segment + 1) * span, count), LANES * SITES):
        left = tl.minimum(count - block, LANES * SITES).to(tl.int32)
        row = _load_row(alpha + 2 * heads * block, site, heads, left, 1.0, SITES)
        a, b = _choose(lane == 0, a0, (1.0, 0.0)), _choose(lane == 0, b0, (0.0, 0.0))
        c, d = _choose(lane == 0, c0, (0.0, 0.0)), _choose(lane == 0, d0, (1.0, 0.0))
        for i in tl.static_range(SITES):
            a, b, c, d = _append(m, row[i], a, b, c, d)  # past the end of the chain, too, where nothing reads it
        a, b, c, d = _scan_matrices(a, b, c, d)
        if FOLD:
            last = lane == LANES - 1
            a0, b0, c0, d0 = _pick(last, a), _pick(last, b), _pick(last, c), _pick(last, d)
        else:
            x = _of_lane_before(_times(b, reciprocal(d)), lane, b0)
            pointers = _pointers(g + 2 * heads * block, site, heads)
            for i in tl.static_range(SITES):
                valid = site + i < left
                x = _choose(valid, _next(m, row[i], x), x)
                tl.store(pointers + 2 * heads * i, tl.join(x[0], x[1]), mask=valid[:, None])
            b0 = _pick(lane == (left - 1) // SITES, x)

    if FOLD:
        _store(maps, 0, a0)
        _store(maps, 1, b0)
        _store(maps, 2, c0)
        _store(maps, 3, d0)
    elif segment == tl.maximum(count - 1, 0) // span:
        _store(final_state, sequence * heads + head, b0)


@triton.jit(do_not_specialize=["length", "heads", "segments", "span"])
def _backward_kernel(
    grad,
    grad_final,
    g,
    coupling,
    state,
    cu_seqlens,
    maps,
    grads,
    length,
    heads,
    segments,
    span,
    LANES: tl.constexpr,
    SITES: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Compute the gradients of a segment from the adjoint that arrives at its end.

    With FOLD it computes the segment's map instead, ``x -> a x + b``. Sites, lanes and segments count from the end of
    the chain.
    """
    head, sequence, segment, start, count = _chain(cu_seqlens, length, heads, segments)
    m = tl.load(coupling + head)
    end = 2 * ((start + count - 1) * heads + head)
    grad += end
    grad_alpha = grads.alpha + end
    g += end
    maps += 4 * tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    site = lane * SITES  # the lane's first in a block
    zero, one = tl.zeros((), tl.float32), tl.full((), 1.0, tl.float32)

    # The map of all sites that were passed. A number that arrives from there is b alone.
    a0, b0 = (one, zero), (zero, zero)
    if not FOLD:
        b0 = _load_optional(grad_final, sequence * heads + head)
        if segment > 0:
            passed = (lane > 0) & (lane <= segment)
            affine = 2 * heads * (lane - 1 - segment)
            a = _load(maps, affine, passed, 0.0)
            b = _choose(lane == 0, b0, _load(maps, affine + 1, passed, 0.0))
            b0 = _pick(lane == segment, _scan_affine(a, b)[1])

    before_chain = _load_optional(state, sequence * heads + head)
    total = tl.zeros((LANES,), tl.float32)
    for block in range(segment * span, tl.minimum((segment + 1) * span, count), LANES * SITES):
        left = tl.minimum(count - block, LANES * SITES + 1).to(tl.int32)
        g_row = _load_row(g - 2 * heads * block, site, -heads, left, 0.0, SITES + 1)
        grad_row = _load_row(grad - 2 * heads * block, site, -heads, left, 0.0, SITES)
        a, b = _choose(lane == 0, a0, (1.0, 0.0)), _choose(lane == 0, b0, (0.0, 0.0))
        for i in tl.static_range(SITES):
            slope = _scaled(m, _squared_conj(g_row[i]))
            a, b = _times(slope, a), _times(slope, _plus(grad_row[i], b))
        a, b = _scan_affine(a, b)
        if FOLD:
            last = lane == LANES - 1
            a0, b0 = _pick(last, a), _pick(last, b)
        else:
            b = _of_lane_before(b, lane, b0)
            pointers = _pointers(grad_alpha - 2 * heads * block, site, -heads)
            for i in tl.static_range(SITES):
                valid = site + i < left
                through = _times(_squared_conj(g_row[i]), _plus(grad_row[i], b))
                tl.store(pointers - 2 * heads * i, tl.join(-through[0], -through[1]), mask=valid[:, None])
                g_before = _choose(site + i + 1 == left, before_chain, g_row[i + 1])
                total += through[0] * g_before[0] + through[1] * g_before[1]
                b = _choose(valid, _scaled(m, through), b)
            b0 = _pick(lane == (tl.minimum(left, LANES * SITES) - 1) // SITES, b)

    if FOLD:
        _store(maps, 0, a0)
        _store(maps, 1, b0)
    else:
        tl.store(grads.sums + tl.program_id(0), tl.sum(total, 0))
        if segment == tl.maximum(count - 1, 0) // span:
            _store(grads.state, sequence * heads + head, b0)
