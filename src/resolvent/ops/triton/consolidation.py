"""Consolidation of a memory in a program's registers, and its adjoint: ``ops.consolidation`` in Triton.

Shapes: K key width, V value width, both as far as they are padded.
"""

from typing import Any

import triton
import triton.language as tl

from .arguments import State, constexpr

_kernel: Any = triton.jit

LOG2_E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("tf32x3")  # of float32 products
_TINY = tl.constexpr(1e-20)  # that of ``ops.consolidation``
_LEAST = tl.constexpr(1e-35)  # added to the mean square of a gradient, which may be small


@_kernel
def sigmoid(x):
    # 1 / y is rsqrt(y)²: two instructions, where a division takes eight.
    root = tl.rsqrt(1 + tl.exp2(-(x * LOG2_E)))
    return root * root


@_kernel
def forgotten_share(forgetting):
    """Return ``1 - exp(-Γ̄)``, as a series where the difference would lose digits."""
    x = forgetting
    series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6)))))
    return tl.where(x < 0.25, series, 1 - tl.exp(-x))


@_kernel
def snr_factors(unit, forgotten, constants):
    """Return ``1 / p``, ``1 / p - 1`` and ``p² / (1 + m (1 - exp(-Γ̄)))`` of a memory in units of its rms.

    ``forgotten`` is the strength times ``1 - exp(-Γ̄)``. See ``ops.consolidation``: p and the divisor are quotients of
    polynomials of ``1 / p - 1``, and one root gives the inverse of all: a division takes eight instructions.
    """
    steepness = LOG2_E / constants.temperature
    odds = tl.exp2(tl.minimum(constants.threshold * steepness - tl.abs(unit) * steepness, 40.0))
    inverse_keep = 1 + odds
    divisor = inverse_keep * (1 + forgotten * constants.damping) - forgotten * constants.span  # over p
    root = tl.rsqrt(inverse_keep * divisor)
    return inverse_keep, odds, root * root


@_kernel
def unit_rms(x, size, tiny):
    """Return x divided by its rms, and the rms."""
    mean_square = tl.sum(x * x) / size + tiny
    inverse = tl.rsqrt(mean_square)
    return x * inverse, mean_square * inverse


@_kernel
def rotate(basis, x):
    """Return ``basis @ x`` for x near unit rms: float16 holds it as well as tf32, whose products cost twice as much."""
    return tl.dot(basis, x.to(basis.dtype), input_precision=PRECISION)


@_kernel
def resonate(unit, filters, constants, variant: constexpr):
    """Return a memory's modes, their energies relative to the mean, the inverse of the mean, and the gate."""
    modes = rotate(tl.trans(filters.basis), unit)
    energies = tl.sum(modes * modes, 1)
    inverse_mean = 1 / (tl.sum(energies) / variant.K + _TINY)
    relative = energies * inverse_mean
    gate = sigmoid(filters.sharpness * (relative - constants.energy_threshold) + filters.bias)
    return modes, relative, inverse_mean, gate


@_kernel
def _beside(x, other):
    """Return x in the registers of the threads that hold ``other``.

    What is loaded lies elsewhere than what a product leaves. Where the two meet late, the compiler moves everything
    that was computed from one of them, not that one.
    """
    return x + 0.0 * other


@_kernel
def filtered(unit, forgetting, filters, constants, variant: constexpr):
    """Return what the filters of a head leave of a memory in units of its rms."""
    if variant.SNR:
        inverse_keep, _, scale = snr_factors(unit, filters.strength * forgotten_share(forgetting), constants)
        unit *= inverse_keep * inverse_keep * scale
    if variant.RESONANCE:
        modes, _, _, gate = resonate(unit, filters, constants, variant)
        unit = rotate(filters.basis, gate[:, None] * modes)
    return unit


@_kernel
def in_units(memory, variant: constexpr):
    """Return a memory in units of its rms, and the rms."""
    return unit_rms(memory, variant.K * variant.V, _TINY)


@_kernel
def consolidate(state, filters, constants, variant: constexpr):
    """Return the consolidated memory of a head, from its ``State`` and its ``Filters``."""
    unit, rms = in_units(state.memory, variant)
    return filtered(unit, state.forgetting, filters, constants, variant) * rms


@_kernel
def _resonance_back(grad, unit, filters, constants, variant: constexpr):
    """Return the gradients of a memory in units of its rms, and, by mode, of the sharpness and the bias in these units.

    ``unit`` is the memory in front of the resonance.
    """
    modes, relative, inverse_mean, gate = resonate(unit, filters, constants, variant)
    # What comes through the energies is up to ``32 sharpness`` times as large, and must fit into float16.
    mean_square = tl.sum(grad * grad) / (variant.K * variant.V) + _LEAST
    inverse, louder = tl.rsqrt(mean_square), 1 + tl.abs(filters.sharpness)
    grad_modes = rotate(tl.trans(filters.basis), grad * (inverse / louder))
    of_gate = tl.sum(grad_modes * modes, 1) * (gate * (1 - gate))
    of_energy = (of_gate - tl.sum(of_gate * relative) / variant.K) * (2 * inverse_mean * filters.sharpness)
    grad_modes = grad_modes * gate[:, None] + modes * of_energy[:, None]
    scale = mean_square * inverse * louder
    grad_bias = of_gate * scale
    return rotate(filters.basis, grad_modes) * scale, grad_bias * (relative - constants.energy_threshold), grad_bias


@_kernel
def _sums(a, b):
    """Return the sums of two matrices, whose last steps, between warps, are one."""
    return tl.split(tl.sum(tl.join(tl.sum(a, 1), tl.sum(b, 1)), 0))


@_kernel
def consolidate_back(grad, met, filters, constants, variant: constexpr, STRENGTH: tl.constexpr):
    """Return the gradients of a boundary's inputs.

    They are those of the state that ``met`` the boundary, of the strength, and by mode of the sharpness and the bias.
    """
    BK: tl.constexpr = variant.BK
    grad_sharpness, grad_bias = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    grad_forgetting, grad_strength = 0.0, 0.0
    unit, share = _beside(met.unit.to(tl.float32), grad), forgotten_share(met.forgetting)
    behind_snr, forgotten = unit, filters.strength * share
    if variant.SNR:
        inverse_keep, odds, scale = snr_factors(unit, forgotten, constants)
        inverse = inverse_keep * inverse_keep * scale
        behind_snr = unit * inverse
    if variant.RESONANCE:
        grad, grad_sharpness, grad_bias = _resonance_back(grad, behind_snr, filters, constants, variant)
        grad_sharpness *= met.rms
        grad_bias *= met.rms
    if variant.SNR:
        # 1. Through the quotient, to the memory directly and to its divisor.
        grad *= inverse
        along = grad * unit
        # 2. From the divisor to p, and through the ratio |S| / rms to the memory, directly and through the rms.
        slope = tl.abs(unit) * (forgotten * constants.span / constants.temperature) * (odds * scale)
        relative = inverse_keep * scale * (constants.damping * inverse_keep - constants.span)
        of_rms, of_forgotten = _sums(along * slope, along * relative)
        grad = grad + grad * slope - unit * (of_rms / (variant.K * variant.V))
        # 3. From the divisor to Γ̄ and the strength.
        of_forgotten *= -met.rms
        grad_forgetting += filters.strength * tl.exp(-met.forgetting) * of_forgotten
        if STRENGTH:
            grad_strength += share * of_forgotten
    grad_state = State(grad, grad_forgetting)  # pyrefly: ignore[bad-argument-type]
    return grad_state, grad_strength, grad_sharpness, grad_bias
