"""Triton kernels for one token of a few sequences, in few launches per block.

At this size a GPU waits for launches and for weights, so programs compute again what they can: norms are part of the
product that follows them, activations and residual sums of the product before. Where the GPU can, a launch begins while
the launch before it ends: it loads its weights and then waits for the results of the other. Everything but the weights
is float32. The functions here update their arguments in place: the residual stream and the state.

Shapes: B sequences, D width of the input, R rows of a weight, H heads, K = V head width, W convolution width, G width
of the gate.
"""

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ...layers import DissipativeBKLayer, DissipativeHebbianLayer
from ...ops import Consolidation, MemoryState
from ...ops.dispatch import count_run
from ...ops.triton.arguments import Filters, State, constants_of, constexpr, make_variant, parts_of
from ...ops.triton.bk_core import reciprocal
from ...ops.triton.hebbian_kernels import cells_of, load_state
from ...ops.triton.hebbian_step import Token, advance
from ...ops.triton.launch import early, let_next_begin, wait_for_last
from ...ops.triton.queries_keys_values import TINY

_kernel: Any = triton.jit
_EPS = tl.constexpr(1e-5)  # that of ``ops.normalize.unit_rms``
_ELEMENTS = 4096
"""Weights that a program of a product holds: few enough for many programs, enough to hide their latency."""


class Norm(NamedTuple):
    """A layer norm: weight (D,), bias (D,) and epsilon; Nones for none."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


class _Product(NamedTuple):
    """Another product with the same input: weight (R, D), result (B, R) and R; Nones for none."""

    weight: Tensor | None = None
    out: Tensor | None = None
    rows: int = 0


_NO_NORM, _NO_PRODUCT = Norm(), _Product()


class _Potential(NamedTuple):
    """Weights of V, of an adaptive Γ and of the memory's feedback, Γ's bias, and two numbers."""

    v: Tensor
    gamma: Tensor | None
    memory: Tensor | None
    gamma_bias: Tensor
    least_decay: float
    memory_scale: float


class _Chain(NamedTuple):
    """Parameters of the resolvent's chains, (H,) each, and their g (B, H, 2), which is updated in place."""

    h0_super: Tensor
    h0_sub: Tensor
    kappa: Tensor
    energy: Tensor
    log_zeta: Tensor
    g: Tensor


class _Conv(NamedTuple):
    """Projections (B, 3HK), the W - 1 before them (B, W - 1, 3HK), and the taps (W, 3HK)."""

    projected: Tensor
    tail: Tensor
    taps: Tensor


class _Layer(NamedTuple):
    """Numbers that ``_remember`` is compiled for besides a ``Variant``.

    Attributes:
        W: taps of the convolution.
        BG: width of the gate, padded to a power of two.
        NORM: RMS-normalise the read-out.
    """

    W: int
    BG: int
    NORM: bool


class _Gate(NamedTuple):
    """The narrow side of a gate (B, G), its weight (HV, G), bias (HV,) and width; Nones for none."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    width: int


@_kernel
def _normalized(x, norm, columns, inside, width):
    """Apply a layer norm to a row."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + norm.eps)
    gain = tl.load(norm.weight + columns, mask=inside, other=0.0).to(tl.float32)
    return centred * scale * gain + tl.load(norm.bias + columns, mask=inside, other=0.0).to(tl.float32)


@_kernel
def _embed(
    token, position, table, pace, amplitude, x, factor, D, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    let_next_begin(EARLY)
    sequence, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < D
    wait_for_last(EARLY)
    row = tl.load(table + tl.load(token + sequence) * D + columns, mask=inside, other=0.0).to(tl.float32)
    turns = tl.load(position + sequence).to(tl.float64) * tl.load(pace + columns // 2, mask=inside, other=0.0)
    phase = (turns - tl.floor(turns)).to(tl.float32) * 6.283185307179586
    waves = tl.where(columns % 2 == 0, tl.sin(phase), tl.cos(phase))
    row += tl.load(amplitude) * waves
    tl.store(x + sequence * D + columns, row * factor, mask=inside)


@_kernel
def _linear(
    x, norm, weight, bias, out, rows, other, batch, width, ACTIVATION: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    program = tl.program_id(0)
    if other.weight is not None:
        first = tl.cdiv(rows, ROWS)
        if program >= first:
            weight, out, rows, program = other.weight, other.out, other.rows, program - first
    columns, row = tl.arange(0, BLOCK), program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, wanted = columns < width, row < rows
    in_tile = wanted[:, None] & inside[None, :]
    matrix = tl.load(weight + row[:, None] * width + columns[None, :], mask=in_tile, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu":
        tile = (rows + row)[:, None] * width + columns[None, :]
        values = tl.load(weight + tile, mask=in_tile, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + row, mask=wanted, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    for sequence in range(batch):
        given = tl.load(x + sequence * width + columns, mask=inside, other=0.0)
        if norm.weight is not None:
            given = _normalized(given, norm, columns, inside, width)
        result = tl.sum(matrix * given[None, :], 1)
        if bias is not None:
            result += shift
        if ACTIVATION == "gelu":
            result *= 0.5 * (1 + tl.erf(result * 0.7071067811865476))
        if ACTIVATION == "swiglu":
            result *= tl.sigmoid(result) * tl.sum(values * given[None, :], 1)
        at_out = out + sequence * rows + row
        if ADD:
            result += tl.load(at_out, mask=wanted, other=0.0)
        tl.store(at_out, result, mask=wanted)


@_kernel
def _scatter(
    x, readout, norm, weights, chain, bk_weight, gamma, D, H, memory_width, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    MEMORY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute the potential and a site of every chain, and add the features to the residual stream."""
    let_next_begin(EARLY)
    sequence, columns, heads = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, HEADS)
    inside, there = columns < D, heads < H
    # 1. Load everything before anything waits for a sum.
    tile, in_tile = heads[:, None] * D + columns[None, :], there[:, None] & inside[None, :]
    of_v, of_gamma = tl.load(weights.v + tile, mask=in_tile, other=0.0), tl.zeros([HEADS, BLOCK], tl.float32)
    if weights.gamma is not None:
        of_gamma += tl.load(weights.gamma + tile, mask=in_tile, other=0.0).to(tl.float32)
    turned, in_turned = columns[:, None] * 2 * H + heads[None, :], inside[:, None] & there[None, :]
    of_re = tl.load(bk_weight + turned, mask=in_turned, other=0.0).to(tl.float32)
    of_im = tl.load(bk_weight + turned + H, mask=in_turned, other=0.0).to(tl.float32)
    potential = -tl.load(chain.energy + heads, mask=there, other=0.0).to(tl.float32)
    gamma_logit = tl.load(weights.gamma_bias + heads, mask=there, other=0.0).to(tl.float32)
    kappa = tl.abs(tl.load(chain.kappa + heads, mask=there, other=0.0).to(tl.float32))
    zeta = tl.exp(tl.load(chain.log_zeta + heads, mask=there, other=0.0).to(tl.float32))
    hopping = tl.load(chain.h0_super + heads, mask=there, other=0.0).to(tl.float32)
    hopping = tl.abs(hopping * tl.load(chain.h0_sub + heads, mask=there, other=0.0).to(tl.float32))
    if weights.memory is not None:
        cells = tl.arange(0, MEMORY)
        back = heads[:, None] * memory_width + cells[None, :]
        in_back = there[:, None] & (cells < memory_width)[None, :]
        feedback = tl.load(weights.memory + back, mask=in_back, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    old = tl.load(x + sequence * D + columns, mask=inside, other=0.0)
    at_g = chain.g + 2 * (sequence * H + heads)
    g_re, g_im = tl.load(at_g, mask=there, other=0.0), tl.load(at_g + 1, mask=there, other=0.0)
    if weights.memory is not None:
        memory = tl.load(readout + sequence * memory_width + cells, mask=cells < memory_width, other=0.0)
        potential += weights.memory_scale * tl.sum(feedback * memory[None, :], 1)
    tl.debug_barrier()  # several threads read the same numbers: all of them, before one of them writes

    # 2. V and Γ of every head.
    given = _normalized(old, norm, columns, inside, D)[None, :]
    potential += tl.sum(of_v.to(tl.float32) * given, 1)
    gamma_logit += tl.sum(of_gamma * given, 1)
    softplus = tl.maximum(gamma_logit, 0.0) + tl.log(1 + tl.exp(-tl.abs(gamma_logit)))
    gamma_of_heads = softplus + weights.least_decay
    tl.store(gamma + sequence * H + heads, gamma_of_heads, mask=there)
    # 3. A site of every chain, and its features.
    re, im = reciprocal((potential - hopping * g_re, -(kappa * gamma_of_heads + zeta) - hopping * g_im))
    tl.store(at_g, re, mask=there)
    tl.store(at_g + 1, im, mask=there)
    tl.store(x + sequence * D + columns, old + tl.sum(of_re * re[None, :] + of_im * im[None, :], 1), mask=inside)


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


@_kernel
def _remember(
    conv, gamma, log_eta, state, position, filters, gate, readout, gated, dt, constants, H, variant: constexpr,
    layer: constexpr, EARLY: tl.constexpr,
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
    if gate.x is not None:
        down = tl.arange(0, layer.BG)
        tile, mask = channels[:, None] * gate.width + down[None, :], inside[:, None] & (down < gate.width)[None, :]
        up = tl.load(gate.weight + tile, mask=mask, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    query, q_rows = _convolved(conv, sequence, channels, inside, C, W)
    key, k_rows = _convolved(conv, sequence, H * K + channels, inside, C, W)
    value, v_rows = _convolved(conv, sequence, 2 * H * K + channels, inside, C, W)
    opening = tl.zeros_like(value)
    if gate.x is not None:
        at_gate = gate.x + sequence * gate.width + down
        opening += tl.sum(up * tl.load(at_gate, mask=down < gate.width, other=0.0)[None, :], 1)
        opening += tl.load(gate.bias + channels, mask=inside, other=0.0).to(tl.float32)
    query *= tl.rsqrt(tl.sum(query * query, 0) + K * TINY)
    key *= tl.rsqrt(tl.sum(key * key, 0) + K * TINY) * tl.exp(tl.load(log_eta + head).to(tl.float32))
    boundary = (tl.load(position + sequence) + 1) % tl.maximum(constants.interval, 1) == 0
    strength = 1.0
    if filters.strength is not None:
        strength *= tl.sigmoid(tl.load(filters.strength + head).to(tl.float32))
    tl.debug_barrier()  # several threads read the same numbers: all of them, before one of them writes
    _store_tail(conv.tail, q_rows, sequence, channels, inside, C, W)
    _store_tail(conv.tail, k_rows, sequence, H * K + channels, inside, C, W)
    _store_tail(conv.tail, v_rows, sequence, 2 * H * K + channels, inside, C, W)
    out = advance(
        Token(query, key, value, tl.load(gamma + row) * dt), State(memory, forgetting), state, boundary,
        strength, filters, row, head, (square, in_square), constants, variant,
    )  # fmt: skip
    if layer.NORM:
        out *= tl.rsqrt(tl.sum(out * out, 0) / K + _EPS)
    tl.store(readout + row * K + cells, out, mask=inside)
    if gate.x is not None:
        tl.store(gated + row * K + cells, out * tl.sigmoid(opening), mask=inside)


# ------------------------------------------------------------------------------------------------------- the launches


def embed(
    token: Tensor,
    position: Tensor,
    table: Tensor,
    pace: Tensor,
    amplitude: Tensor,
    factor: float,
    out: Tensor,
) -> None:
    """Compute ``out`` (B, D), ``factor`` times the sum of token and position embedding.

    Args:
        token: (B,).
        position: tokens read before, (B,).
        table: token embedding, (vocabulary, D).
        pace: turns per token of the waves of ``ZetaEmbedding``, float64 (D / 2,).
        amplitude: of the waves, ().
        factor: factor of the sum.
        out: allocated for the result.
    """
    width = table.shape[1]
    sizes = (factor, width, triton.next_power_of_2(width))
    with torch.cuda.device_of(out):
        _embed[(len(token),)](
            token.contiguous(), position, table, pace, amplitude, out, *sizes, num_warps=4, **early(out.device)
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    norm: Norm | None = None,
    activation: Literal["gelu", "swiglu"] | None = None,
    add: bool = False,
    other: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Compute ``activation(norm(x) weightᵀ + bias)`` into ``out`` (B, R), or with ``add`` add it to ``out``.

    x is (B, D), the weight (R, D), the bias (R,). For ``swiglu`` the weight is (2R, D), gates and values, as
    ``layers.GatedFeedForward`` has them. ``other`` is another weight, with the tensor for its product with the same
    ``norm(x)``; neither product then has a bias.
    """
    (rows, width), block = weight.shape, triton.next_power_of_2(weight.shape[1])
    matrices = 2 if activation == "swiglu" else 1
    rows //= matrices
    held = max(1, min(triton.next_power_of_2(rows), _ELEMENTS // (matrices * block)))
    second = _NO_PRODUCT if other is None else _Product(*other, len(other[0]))
    with torch.cuda.device_of(out):
        _linear[(triton.cdiv(rows, held) + triton.cdiv(second.rows, held),)](
            x, norm or _NO_NORM, weight, bias, out, rows, second, len(x), width,
            ACTIVATION=activation, ADD=add, BLOCK=block, ROWS=held, num_warps=4, **early(out.device),
        )  # fmt: skip


def scatter(
    x: Tensor, readout: Tensor | None, norm: Norm, layer: DissipativeBKLayer, bk_weight: Tensor, g: Tensor, out: Tensor
) -> None:
    """Add a token's resolvent features to x (B, D), write its Γ to ``out`` (B, H), and update g (B, H, 2).

    ``readout`` is that of the block before, (B, HV), ``bk_weight`` the weight of the features, (D, 2H).
    """
    potential, (batch, width) = layer.potential, x.shape
    adaptive, back = potential.gamma_proj, None if readout is None else potential.memory_to_potential
    memory_width = 1 if back is None else back.in_features
    gamma, memory = (None if linear is None else linear.weight for linear in (adaptive, back))
    scale = potential.memory_scale
    weights = _Potential(potential.v_proj.weight, gamma, memory, potential.gamma_bias, potential.least_decay, scale)
    chain = _Chain(layer.h0_super, layer.h0_sub, layer.kappa, layer.energy, layer.log_zeta, g)
    count_run("resolvent_diagonal", "triton")
    with torch.cuda.device_of(out):
        _scatter[(batch,)](
            x, readout, norm, weights, chain, bk_weight, out, width, potential.num_heads, memory_width,
            BLOCK=triton.next_power_of_2(width), HEADS=triton.next_power_of_2(potential.num_heads),
            MEMORY=triton.next_power_of_2(memory_width), num_warps=8, **early(out.device),
        )  # fmt: skip


def remember(
    projected: Tensor,
    gamma: Tensor,
    gate: Tensor | None,
    position: Tensor,
    layer: DissipativeHebbianLayer,
    consolidation: Consolidation | None,
    strength_logit: Tensor | None,
    state: MemoryState,
    tail: Tensor,
    readout: Tensor,
    gated: Tensor,
) -> None:
    """Write a token into the memories of a layer and read them; the state and the tail are updated in place.

    Args:
        projected: queries, keys and values, (B, 3HK).
        gamma: Γ, (B, H).
        gate: the narrow side of the gate, (B, G), if there is one.
        position: tokens read before, int64 (B,) on the device.
        layer: the layer.
        consolidation: filters that act at its boundaries, the basis in float32.
        strength_logit: logit of the SNR filter's strength, (H,), which is read again for every token; None for full
            strength.
        state: memory (B, H, K, V) and Γ̄ (B, H).
        tail: conv state, (B, W - 1, 3HK).
        readout: allocated for the read-out, (B, HV).
        gated: allocated for the gated read-out, (B, HV); stays as it is without a gate.
    """
    filters, rule = parts_of(consolidation)
    variant = make_variant(layer.head_dim, layer.head_dim, False, len(rule.snr) > 0, filters.basis is not None)
    up, narrow, taps = layer.gate_up, 1 if gate is None else gate.shape[1], layer.conv_weight
    assert taps is not None  # ``TokenStep`` refuses a model without a short convolution
    count_run("dissipative_memory", "triton")
    with torch.cuda.device_of(gated):
        _remember[(len(projected), layer.num_heads)](
            _Conv(projected, tail, taps), gamma, layer.log_eta, State(*state), position,
            Filters(strength_logit, *filters[1:]), _Gate(gate, *_of_linear(up), narrow), readout, gated, layer.dt,
            constants_of(rule), layer.num_heads, variant,
            _Layer(len(taps), triton.next_power_of_2(narrow), layer.output_norm), num_warps=8, **early(gated.device),
        )  # fmt: skip


def _of_linear(linear: nn.Linear | None) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of a linear map; Nones for none."""
    return (None, None) if linear is None else (linear.weight, linear.bias)
