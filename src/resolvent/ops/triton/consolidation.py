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
def snr_factors(memory, forgetting, strength, constants, size):
    """Return ``1 / rms``, ``p``, and the inverse of the divisor ``1 + m (1 - exp(-Γ̄))`` (see ``ops.consolidation``)."""
    scale = tl.rsqrt(tl.sum(memory * memory) / size + _TINY)
    keep = sigmoid(tl.abs(memory) * (scale / constants.temperature) - constants.threshold / constants.temperature)
    forgotten = strength * forgotten_share(forgetting)
    # The divisor lies in (0, gamma_boost]: two instructions for its inverse, where a division takes eight.
    root = tl.rsqrt(1 + forgotten * (constants.damping - constants.span * keep))
    return scale, keep, root * root


@_kernel
def unit_rms(x, size, tiny):
    """Return x divided by its rms, and the rms."""
    mean_square = tl.sum(x * x) / size + tiny
    inverse = tl.rsqrt(mean_square)
    return x * inverse, mean_square * inverse


@_kernel
def rotate(basis, x):
    """Return ``basis @ x`` for x of unit rms: float16 holds it as well as tf32, whose products cost twice as much."""
    return tl.dot(basis, x.to(basis.dtype), input_precision=PRECISION)


@_kernel
def resonate(memory, filters, constants, variant: constexpr):
    """Return a memory's modes in units of its rms, their energies relative to the mean, the gate, and the rms."""
    unit, rms = unit_rms(memory, variant.K * variant.V, _TINY)
    modes = rotate(tl.trans(filters.basis), unit)
    relative = tl.sum(modes * modes, 1) / variant.V  # the basis is orthonormal: the mean energy of unit rms is V
    gate = sigmoid(filters.sharpness * (relative - constants.energy_threshold) + filters.bias)
    return modes, relative, gate, rms


@_kernel
def _beside(x, other):
    """Return x in the registers of the threads that hold ``other``.

    What is loaded lies elsewhere than what a product leaves. Where the two meet late, the compiler moves everything
    that was computed from one of them, not that one.
    """
    return x + 0.0 * other


@_kernel
def consolidate(state, filters, constants, variant: constexpr):
    """Return the consolidated memory of a head, from its ``State`` and its ``Filters``."""
    memory = state.memory
    if variant.SNR:
        _, _, inverse = snr_factors(memory, state.forgetting, filters.strength, constants, variant.K * variant.V)
        memory *= inverse
    if variant.RESONANCE:
        modes, _, gate, rms = resonate(memory, filters, constants, variant)
        memory = rotate(filters.basis, gate[:, None] * modes) * rms
    return memory


@_kernel
def _resonance_back(grad, memory, filters, constants, variant: constexpr):
    """Return the gradients of a memory in front of the resonance, and of the sharpness and the bias by mode."""
    K: tl.constexpr = variant.K
    V: tl.constexpr = variant.V
    modes, relative, gate, rms = resonate(memory, filters, constants, variant)
    unit, grad_rms = unit_rms(grad, K * V, _LEAST)
    grad_modes = rotate(tl.trans(filters.basis), unit)
    grad_bias = tl.sum(grad_modes * modes, 1) * (gate * (1 - gate) * (grad_rms * rms))
    grad_sharpness = grad_bias * (relative - constants.energy_threshold)
    grad_relative = filters.sharpness * grad_bias
    grad_energy = (grad_relative - tl.sum(grad_relative * relative) / K) * (2 / (V * rms))
    grad_modes = grad_modes * (gate * grad_rms)[:, None] + modes * grad_energy[:, None]
    unit, grad_rms = unit_rms(grad_modes, K * V, _LEAST)
    return rotate(filters.basis, unit) * grad_rms, grad_sharpness, grad_bias


@_kernel
def consolidate_back(grad, met, square, in_square, filters, constants, variant: constexpr, STRENGTH: tl.constexpr):
    """Return the gradients of a boundary's inputs.

    They are those of the state that ``met`` the boundary, of the strength, and by mode of the sharpness and the bias.

    The memory is read twice, where ``met`` points, rather than held: a program has few registers left.
    """
    BK: tl.constexpr = variant.BK
    grad_sharpness, grad_bias = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    grad_forgetting, grad_strength = 0.0, 0.0
    strength, forgetting = filters.strength, tl.load(met.forgetting)
    size: tl.constexpr = variant.K * variant.V
    if variant.RESONANCE:
        memory = _beside(tl.load(met.memory + square, mask=in_square, other=0.0), grad)
        if variant.SNR:
            _, _, inverse = snr_factors(memory, forgetting, strength, constants, size)
            memory *= inverse
        grad, grad_sharpness, grad_bias = _resonance_back(grad, memory, filters, constants, variant)
    if variant.SNR:
        # 1. Through the quotient, to the memory directly and to its divisor.
        memory = _beside(tl.load(met.memory + square, mask=in_square, other=0.0, volatile=True), grad)
        scale, keep, inverse = snr_factors(memory, forgetting, strength, constants, size)
        grad = grad * inverse
        grad_divisor = -grad * (memory * inverse)
        # 2. From the divisor to Γ̄ and the strength.
        of_forgotten = tl.sum(grad_divisor * (constants.damping - constants.span * keep))
        grad_forgetting += strength * tl.exp(-forgetting) * of_forgotten
        if STRENGTH:
            grad_strength += forgotten_share(forgetting) * of_forgotten
        # 3. From the divisor to p, and through the ratio |S| / rms to the memory.
        grad_keep = grad_divisor * (-constants.span * strength * forgotten_share(forgetting))
        grad_ratio = grad_keep * (keep * (1 - keep) * (1 / constants.temperature))
        # In units of the rms: the cube of the scale leaves the range of float32 before the memory's square does.
        from_scale = tl.sum(grad_ratio * (tl.abs(memory) * scale)) * (scale * scale / size)
        grad_ratio = tl.where(memory < 0, -grad_ratio, tl.where(memory > 0, grad_ratio, 0.0))
        grad = grad + grad_ratio * scale - from_scale * memory
    grad_state = State(grad, grad_forgetting)  # pyrefly: ignore[bad-argument-type]
    return grad_state, grad_strength, grad_sharpness, grad_bias
