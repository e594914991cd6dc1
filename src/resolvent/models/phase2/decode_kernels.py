"""Triton kernels for one token of a few sequences: BK-Core with memory or attention, one launch a block.

A program takes one head of one sequence. Everything but the weights is float32. The functions here update their
arguments in place: the state and the read-outs. The products before and after are those of ``decode_products``.

Shapes: B sequences, H heads, K = V head width, W convolution width, G width of the gate, L slots of a window.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ...layers import DissipativeBKLayer, DissipativeHebbianLayer, LocalAttentionLayer
from ...layers.heads import HeadsLayer
from ...ops import Consolidation, MemoryState, WindowState
from ...ops.dispatch import count_run
from ...ops.triton.arguments import Filters, State, constants_of, constexpr, make_variant, parts_of
from ...ops.triton.bk_core import reciprocal
from ...ops.triton.hebbian_kernels import cells_of, load_state
from ...ops.triton.hebbian_step import Token, advance
from ...ops.triton.launch import early, let_next_begin, wait_for_last
from ...ops.triton.queries_keys_values import TINY

_kernel: Any = triton.jit
_EPS = tl.constexpr(1e-5)  # that of ``ops.normalize.unit_rms``
_SLOTS = 128
"""Slots of a window that a program attends to."""


class Chains(NamedTuple):
    """The resolvents of a block at one token.

    Attributes:
        layer: the layer.
        v: products of the token with ``v_proj``, (B, H).
        gamma: its products with ``gamma_proj``, (B, H); None where Γ is fixed.
        readout: read-out of the block before, (B, HV); None in the first block.
        g: g of the token before, (B, H, 2), which is updated.
        features: allocated for the features [Re g, Im g], (B, 2H).
    """

    layer: DissipativeBKLayer
    v: Tensor
    gamma: Tensor | None
    readout: Tensor | None
    g: Tensor
    features: Tensor


class Reading(NamedTuple):
    """Tensors around the read-out of a block at one token.

    Attributes:
        projected: queries, keys and values, (B, 3HK).
        gate: the narrow side of the gate, (B, G), if there is one.
        position: tokens read, this one among them, int64 (B,).
        tail: conv state, (B, W - 1, 3HK), which is updated.
        readout: allocated for the read-out, (B, HV).
        gated: allocated for the gated read-out, (B, HV); stays as it is without a gate.
    """

    projected: Tensor
    gate: Tensor | None
    position: Tensor
    tail: Tensor
    readout: Tensor
    gated: Tensor


class _Potential(NamedTuple):
    """Products of the token with the weights of V and of an adaptive Γ, Γ's bias, the memory's feedback, and numbers.

    The feedback is a weight (H, HV) and the read-out that it multiplies, (B, HV), Nones for none.
    """

    v: Tensor
    gamma: Tensor | None
    gamma_bias: Tensor
    feedback: Tensor | None
    readout: Tensor | None
    memory_width: int
    least_decay: float
    memory_scale: float


class _Chain(NamedTuple):
    """Parameters of the resolvent's chains, (H,) each, their g (B, H, 2) and their features (B, 2H)."""

    h0_super: Tensor
    h0_sub: Tensor
    kappa: Tensor
    energy: Tensor
    log_zeta: Tensor
    g: Tensor
    features: Tensor


class _Conv(NamedTuple):
    """Projections (B, 3HK), the W - 1 before them (B, W - 1, 3HK), and the taps (W, 3HK)."""

    projected: Tensor
    tail: Tensor
    taps: Tensor


class _Outputs(NamedTuple):
    """Read-out, and the read-out times its gate, (B, HV) each; the latter stays as it is without a gate."""

    readout: Tensor
    gated: Tensor


class _Layer(NamedTuple):
    """Numbers that a kernel is compiled for besides the widths of a head.

    Attributes:
        W: taps of the convolution.
        BG: width of the gate, padded to a power of two.
        BM: width of the feedback, padded to a power of two.
        NORM: RMS-normalise the read-out.
    """

    W: int
    BG: int
    BM: int
    NORM: bool


class _Widths(NamedTuple):
    """Widths of an attending head.

    Attributes:
        K: width of keys and values.
        BK, BP: K and K / 2 padded to powers of two.
        SLOTS: slots of a part of the window.
        SPLITS: parts.
        BS: parts, padded to a power of two.
    """

    K: int
    BK: int
    BP: int
    SLOTS: int
    SPLITS: int
    BS: int


class _Gate(NamedTuple):
    """The narrow side of a gate (B, G), its weight (HV, G), bias (HV,) and width; Nones for none."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    width: int


class _Window(NamedTuple):
    """Keys and values of the last tokens, (B, L, H, K), and L; a tuple of Triton has ``values`` of its own."""

    k: Tensor
    v: Tensor
    slots: int


class Parts(NamedTuple):
    """Memory for the parts of the windows, and how many of each window have ended, int32 (B, H), zero between launches.

    A part has the greatest score and the sum of the weights relative to it, (B, H, parts), and the weighted sum of the
    values, (B, H, parts, BK).
    """

    greatest: Tensor
    total: Tensor
    sums: Tensor
    ended: Tensor


# --------------------------------------------------------------------------------------------- what the kernels share


@_kernel
def _hopping_and_feedback(potential, chain, head, layer: constexpr):
    """Load the parameters of a head's chain: constants of its site, and its weights of the feedback."""
    energy = tl.load(chain.energy + head).to(tl.float32)
    gamma_bias = tl.load(potential.gamma_bias + head).to(tl.float32)
    kappa = tl.abs(tl.load(chain.kappa + head).to(tl.float32))
    zeta = tl.exp(tl.load(chain.log_zeta + head).to(tl.float32))
    hopping = tl.load(chain.h0_super + head).to(tl.float32) * tl.load(chain.h0_sub + head).to(tl.float32)
    BM: tl.constexpr = layer.BM
    feedback = tl.zeros([BM], tl.float32)
    if potential.feedback is not None:
        cells = tl.arange(0, layer.BM)
        at = potential.feedback + head * potential.memory_width + cells
        feedback += tl.load(at, mask=cells < potential.memory_width, other=0.0).to(tl.float32)
    return energy, gamma_bias, kappa, zeta, tl.abs(hopping), feedback


@_kernel
def _site(constants, potential, chain, sequence, head, H, layer: constexpr):
    """Return Γ of a head and g of its next site."""
    energy, gamma_logit, kappa, zeta, hopping, feedback = constants
    row = sequence * H + head
    v = tl.load(potential.v + row) - energy
    if potential.feedback is not None:
        cells = tl.arange(0, layer.BM)
        at = potential.readout + sequence * potential.memory_width + cells
        memory = tl.load(at, mask=cells < potential.memory_width, other=0.0)
        v += potential.memory_scale * tl.sum(feedback * memory, 0)
    if potential.gamma is not None:
        gamma_logit += tl.load(potential.gamma + row)
    softplus = tl.maximum(gamma_logit, 0.0) + tl.log(1 + tl.exp(-tl.abs(gamma_logit)))
    gamma = softplus + potential.least_decay
    g_re, g_im = tl.load(chain.g + 2 * row), tl.load(chain.g + 2 * row + 1)
    re, im = reciprocal((v - hopping * g_re, -(kappa * gamma + zeta) - hopping * g_im))
    return gamma, re, im


@_kernel
def _store_site(chain, sequence, head, H, re, im):
    row, features = sequence * H + head, chain.features + 2 * sequence * H + head
    tl.store(chain.g + 2 * row, re)
    tl.store(chain.g + 2 * row + 1, im)
    tl.store(features, re)
    tl.store(features + H, im)


@_kernel
def _gate_weights(gate, channels, inside, BK: tl.constexpr, layer: constexpr):
    """Load the weights of the gate of a head's channels, [BK, BG]; zeros without a gate."""
    BG: tl.constexpr = layer.BG
    up = tl.zeros([BK, BG], tl.float32)
    if gate.x is not None:
        down = tl.arange(0, layer.BG)
        tile, mask = channels[:, None] * gate.width + down[None, :], inside[:, None] & (down < gate.width)[None, :]
        up += tl.load(gate.weight + tile, mask=mask, other=0.0).to(tl.float32)
    return up


@_kernel
def _opening(gate, up, sequence, channels, inside, BK: tl.constexpr, layer: constexpr):
    """Return the logit of the gate of a head's channels; zeros without a gate."""
    opening = tl.zeros([BK], tl.float32)
    if gate.x is not None:
        down = tl.arange(0, layer.BG)
        narrow = tl.load(gate.x + sequence * gate.width + down, mask=down < gate.width, other=0.0)
        opening += tl.sum(up * narrow[None, :], 1)
        opening += tl.load(gate.bias + channels, mask=inside, other=0.0).to(tl.float32)
    return opening


@_kernel
def _store_readout(out, opening, gate, outputs, cells, inside, K: tl.constexpr, layer: constexpr):
    """Normalise, store and gate the read-out of a head."""
    if layer.NORM:
        out *= tl.rsqrt(tl.sum(out * out, 0) / K + _EPS)
    tl.store(outputs.readout + cells, out, mask=inside)
    if gate.x is not None:
        tl.store(outputs.gated + cells, out * tl.sigmoid(opening), mask=inside)


@_kernel
def _convolved(conv, sequence, channels, inside, C, W: tl.constexpr):
    """Return SiLU of the convolution at the newest token, and the rows of the next tail, newest first."""
    newest = tl.load(conv.projected + sequence * C + channels, mask=inside, other=0.0)
    sum_of_taps, rows = newest * tl.load(conv.taps + channels, mask=inside, other=0.0).to(tl.float32), (newest,)
    for j in tl.static_range(1, W):
        row = tl.load(conv.tail + (sequence * (W - 1) + W - 1 - j) * C + channels, mask=inside, other=0.0)
        sum_of_taps += row * tl.load(conv.taps + j * C + channels, mask=inside, other=0.0).to(tl.float32)
        rows = rows + (row,)  # noqa: RUF005 (Triton has no starred tuples)
    return sum_of_taps * tl.sigmoid(sum_of_taps), rows


@_kernel
def _store_tail(tail, rows, sequence, channels, inside, C, W: tl.constexpr):
    for j in tl.static_range(W - 1):
        tl.store(tail + (sequence * (W - 1) + W - 2 - j) * C + channels, rows[j], mask=inside)


# ------------------------------------------------------------------------------------------------------- the kernels


@_kernel
def _remember(
    conv, potential, chain, log_eta, state, position, filters, gate, outputs, dt, constants, H,
    variant: constexpr, layer: constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write the token into a head's memory and read it; ``filters`` have the logit of the strength in its place."""
    let_next_begin(EARLY)
    K: tl.constexpr = variant.K
    W: tl.constexpr = layer.W
    sequence, head = tl.program_id(0), tl.program_id(1)
    row, cells = sequence * H + head, tl.arange(0, variant.BK)
    inside, C, channels = cells < K, 3 * H * K, head * K + cells
    # The launch that last wrote the state belongs to the token before: it ended before this token's first launch began.
    square, in_square = cells_of(cells, cells, K, K)
    memory, forgetting = load_state(state, row, square, in_square, variant, variant.SNR or variant.RESONANCE)
    up = _gate_weights(gate, channels, inside, variant.BK, layer)
    of_chain = _hopping_and_feedback(potential, chain, head, layer)
    wait_for_last(EARLY)
    query, q_rows = _convolved(conv, sequence, channels, inside, C, W)
    key, k_rows = _convolved(conv, sequence, H * K + channels, inside, C, W)
    value, v_rows = _convolved(conv, sequence, 2 * H * K + channels, inside, C, W)
    gamma, re, im = _site(of_chain, potential, chain, sequence, head, H, layer)
    opening = _opening(gate, up, sequence, channels, inside, variant.BK, layer)
    query *= tl.rsqrt(tl.sum(query * query, 0) + K * TINY)
    key *= tl.rsqrt(tl.sum(key * key, 0) + K * TINY) * tl.exp(tl.load(log_eta + head).to(tl.float32))
    boundary = tl.load(position + sequence) % tl.maximum(constants.interval, 1) == 0
    strength = 1.0
    if filters.strength is not None:
        strength *= tl.sigmoid(tl.load(filters.strength + head).to(tl.float32))
    tl.debug_barrier()  # several threads read the same numbers: all of them, before one of them writes
    _store_site(chain, sequence, head, H, re, im)
    _store_tail(conv.tail, q_rows, sequence, channels, inside, C, W)
    _store_tail(conv.tail, k_rows, sequence, H * K + channels, inside, C, W)
    _store_tail(conv.tail, v_rows, sequence, 2 * H * K + channels, inside, C, W)
    out = advance(
        Token(query, key, value, gamma * dt), State(memory, forgetting), state, boundary,
        strength, filters, row, head, (square, in_square), constants, variant,
    )  # fmt: skip
    _store_readout(out, opening, gate, outputs, row * K + cells, inside, K, layer)


@_kernel
def _rotated(x, y, inverse, cos, sin):
    """Return the two halves of a head's channels, scaled and turned pair by pair."""
    return (x * cos - y * sin) * inverse, (x * sin + y * cos) * inverse


@_kernel
def _slots(window, at, index, K: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr):
    """Load some slots of a head's window, which begin at ``at``: the halves of the keys, and the values."""
    pairs, cells, there = tl.arange(0, BP)[None, :], tl.arange(0, BK)[None, :], (index < window.slots)[:, None]
    first = tl.load(window.k + at[:, None] + pairs, mask=there & (pairs < K // 2), other=0.0)
    second = tl.load(window.k + at[:, None] + K // 2 + pairs, mask=there & (pairs < K // 2), other=0.0)
    return first, second, tl.load(window.v + at[:, None] + cells, mask=there & (cells < K), other=0.0)


@_kernel
def _joined(parts, row, cells, score, value, widths: constexpr):
    """Return what the parts of a window and the token itself, with its score and its value, read together."""
    SPLITS: tl.constexpr = widths.SPLITS
    part, BK = tl.arange(0, widths.BS), widths.BK
    there, at = part < SPLITS, row * SPLITS + part
    greatest = tl.load(parts.greatest + at, mask=there, other=-float("inf"), cache_modifier=".cg")
    totals = tl.load(parts.total + at, mask=there, other=0.0, cache_modifier=".cg")
    sums = tl.load(parts.sums + at[:, None] * BK + cells[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
    above = tl.maximum(tl.max(greatest, 0), score)
    scale, own = tl.exp(greatest - above), tl.exp(score - above)
    return (tl.sum(sums * scale[:, None], 0) + own * value) / (tl.sum(totals * scale, 0) + own)


@_kernel
def _attend(
    conv, potential, chain, log_temperature, pace, window, parts, position, gate, outputs, H, widths: constexpr,
    layer: constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attend to a part of a head's window; the program that ends last joins the parts and updates the state."""
    let_next_begin(EARLY)
    K: tl.constexpr = widths.K
    W: tl.constexpr = layer.W
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, cells, pairs = sequence * H + head, tl.arange(0, widths.BK), tl.arange(0, widths.BP)
    inside, paired, C = cells < K, pairs < K // 2, 3 * H * K
    channels, first, second = head * K + cells, head * K + pairs, head * K + K // 2 + pairs
    # The window is complete but for this token: the launches that wrote it ended before this token's first began.
    base = sequence.to(tl.int64) * window.slots * H * K + head * K
    index = split * widths.SLOTS + tl.arange(0, widths.SLOTS)
    first_keys, second_keys, values = _slots(window, base + index * H * K, index, K, widths.BK, widths.BP)
    up = _gate_weights(gate, channels, inside, widths.BK, layer)
    of_chain = _hopping_and_feedback(potential, chain, head, layer)
    turns = tl.load(pace + pairs, mask=paired, other=0.0)
    temperature = tl.exp(tl.load(log_temperature + head).to(tl.float32))
    wait_for_last(EARLY)
    # 1. Queries, keys and values of the token.
    q_first, q_rows = _convolved(conv, sequence, first, paired, C, W)
    q_second, q_more = _convolved(conv, sequence, second, paired, C, W)
    k_first, k_rows = _convolved(conv, sequence, H * K + first, paired, C, W)
    k_second, k_more = _convolved(conv, sequence, H * K + second, paired, C, W)
    value, v_rows = _convolved(conv, sequence, 2 * H * K + channels, inside, C, W)
    _, re, im = _site(of_chain, potential, chain, sequence, head, H, layer)
    opening = _opening(gate, up, sequence, channels, inside, widths.BK, layer)
    place = tl.load(position + sequence) - 1
    turns *= place.to(tl.float64)
    angle = (turns - tl.floor(turns + 0.5)).to(tl.float32) * 6.283185307179586
    cos, sin = tl.cos(angle), tl.sin(angle)
    q_norm = tl.rsqrt(tl.sum(q_first * q_first + q_second * q_second, 0) + K * TINY)
    k_norm = tl.rsqrt(tl.sum(k_first * k_first + k_second * k_second, 0) + K * TINY)
    query = _rotated(q_first, q_second, q_norm * temperature, cos, sin)
    k_first, k_second = _rotated(k_first, k_second, k_norm, cos, sin)
    # 2. Attend to the slots of this part but for the token's own.
    slot = place % window.slots
    scores = tl.sum(first_keys.to(tl.float32) * query[0][None, :], 1)
    scores += tl.sum(second_keys.to(tl.float32) * query[1][None, :], 1)
    scores = tl.where((index < window.slots) & (index <= place) & (index != slot), scores, -float("inf"))
    greatest = tl.max(scores, 0)
    weights = tl.exp(scores - tl.maximum(greatest, -1e38))  # zeros where no slot is seen
    part = row * widths.SPLITS + split
    tl.store(parts.greatest + part, greatest)
    tl.store(parts.total + part, tl.sum(weights, 0))
    tl.store(parts.sums + part * widths.BK + cells, tl.sum(weights[:, None] * values.to(tl.float32), 0))
    tl.debug_barrier()  # all threads have stored and read, before one of them says so
    # 3. The last program joins the parts. All others have read the state, which it updates.
    if tl.atomic_add(parts.ended + row, 1) == widths.SPLITS - 1:
        tl.store(parts.ended + row, 0)
        _store_site(chain, sequence, head, H, re, im)
        _store_tail(conv.tail, q_rows, sequence, first, paired, C, W)
        _store_tail(conv.tail, q_more, sequence, second, paired, C, W)
        _store_tail(conv.tail, k_rows, sequence, H * K + first, paired, C, W)
        _store_tail(conv.tail, k_more, sequence, H * K + second, paired, C, W)
        _store_tail(conv.tail, v_rows, sequence, 2 * H * K + channels, inside, C, W)
        first_key, second_key = k_first.to(window.k.dtype.element_ty), k_second.to(window.k.dtype.element_ty)
        kept, at = value.to(window.v.dtype.element_ty), base + slot * H * K
        tl.store(window.k + at + pairs, first_key, mask=paired)
        tl.store(window.k + at + K // 2 + pairs, second_key, mask=paired)
        tl.store(window.v + at + cells, kept, mask=inside)
        score = tl.sum(query[0] * first_key.to(tl.float32) + query[1] * second_key.to(tl.float32), 0)
        out = _joined(parts, row, cells, score, kept.to(tl.float32), widths)
        _store_readout(out, opening, gate, outputs, row * K + cells, inside, K, layer)


# ------------------------------------------------------------------------------------------------------- the launches


def remember(
    reading: Reading,
    chains: Chains,
    layer: DissipativeHebbianLayer,
    consolidation: Consolidation | None,
    strength_logit: Tensor | None,
    state: MemoryState,
) -> None:
    """Compute a site of every chain, write a token into the memories of a layer and read them.

    Args:
        reading: tensors around the read-out.
        chains: the resolvents.
        layer: the layer.
        consolidation: filters that act at its boundaries, the basis in float32.
        strength_logit: logit of the SNR filter's strength, (H,), which is read again for every token; None for full
            strength.
        state: memory (B, H, K, V) and Γ̄ (B, H), which are updated.
    """
    filters, rule = parts_of(consolidation)
    variant = make_variant(layer.head_dim, layer.head_dim, False, len(rule.snr) > 0, filters.basis is not None)
    conv, potential, chain, gate, numbers = _arguments(reading, chains, layer)
    count_run("resolvent_diagonal", "triton")
    count_run("dissipative_memory", "triton")
    with torch.cuda.device_of(reading.gated):
        _remember[(len(reading.projected), layer.num_heads)](
            conv, potential, chain, layer.log_eta, State(*state), reading.position,
            Filters(strength_logit, *filters[1:]), gate, _Outputs(reading.readout, reading.gated), layer.dt,
            constants_of(rule), layer.num_heads, variant, numbers, num_warps=8, **early(reading.gated.device),
        )  # fmt: skip


def attend(
    reading: Reading, chains: Chains, layer: LocalAttentionLayer, pace: Tensor, window: WindowState, parts: Parts
) -> None:
    """Compute a site of every chain, put a token into the windows of a layer and attend to them.

    Args:
        reading: tensors around the read-out.
        chains: the resolvents.
        layer: the layer, which has a temperature per head.
        pace: turns of the pairs of channels per token, float64 (K / 2,).
        window: keys and values, (B, L, H, K), which are updated.
        parts: what ``allocate_parts`` returned for the window; one launch at a time uses it.
    """
    conv, potential, chain, gate, numbers = _arguments(reading, chains, layer)
    slots, block, splits = window.keys.shape[1], triton.next_power_of_2(layer.head_dim), parts.total.shape[-1]
    held = min(_SLOTS, triton.next_power_of_2(slots))
    widths = _Widths(layer.head_dim, block, max(1, block // 2), held, splits, triton.next_power_of_2(splits))
    count_run("resolvent_diagonal", "triton")
    count_run("local_attention", "triton")
    with torch.cuda.device_of(reading.gated):
        _attend[(len(reading.projected), layer.num_heads, splits)](
            conv, potential, chain, layer.log_temperature, pace, _Window(*window, slots), parts, reading.position, gate,
            _Outputs(reading.readout, reading.gated), layer.num_heads, widths, numbers, num_warps=8,
            **early(reading.gated.device),
        )  # fmt: skip


def allocate_parts(window: WindowState) -> Parts:
    """Allocate memory for ``attend``, given a window with keys (B, L, H, K), in that order in memory."""
    assert window.keys.is_contiguous() and window.values.is_contiguous()
    batch, slots, heads, width = window.keys.shape
    shape = batch, heads, triton.cdiv(slots, _SLOTS)
    device, block = window.keys.device, triton.next_power_of_2(width)
    greatest, total = (torch.empty(shape, device=device) for _ in range(2))
    ended = torch.zeros(shape[:2], dtype=torch.int32, device=device)
    return Parts(greatest, total, torch.empty(*shape, block, device=device), ended)


def _arguments(reading: Reading, chains: Chains, layer: HeadsLayer) -> tuple[_Conv, _Potential, _Chain, _Gate, _Layer]:
    """Return what both kernels take."""
    potential, up, taps = chains.layer.potential, layer.gate_up, layer.conv_weight
    assert taps is not None  # ``TokenStep`` refuses a model without a short convolution
    feedback = None if chains.readout is None else potential.memory_to_potential
    width = 1 if feedback is None else feedback.in_features
    narrow = 1 if reading.gate is None else reading.gate.shape[1]
    bk = chains.layer
    return (
        _Conv(reading.projected, reading.tail, taps),
        _Potential(
            chains.v, chains.gamma, potential.gamma_bias, None if feedback is None else feedback.weight,
            None if feedback is None else chains.readout, width, potential.least_decay, potential.memory_scale,
        ),
        _Chain(bk.h0_super, bk.h0_sub, bk.kappa, bk.energy, bk.log_zeta, chains.g, chains.features),
        _Gate(reading.gate, *_of_linear(up), narrow),
        _Layer(len(taps), triton.next_power_of_2(narrow), triton.next_power_of_2(width), layer.output_norm),
    )  # fmt: skip


def _of_linear(linear: nn.Linear | None) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of a linear map; Nones for none."""
    return (None, None) if linear is None else (linear.weight, linear.bias)
