"""Consolidation of a memory in a program's registers, and its adjoint: ``ops.consolidation`` in Triton.

The arguments that kernels are given of it are here, too.

Shapes: K key width, V value width, both as far as they are padded.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..consolidation import Consolidation

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
def snr_factors(memory, forgetting, force, threshold, temperature, gamma_boost, size):
    """``1 / rms``, ``p``, the excess ``s (gamma_boost - 1) Γ̄`` and the survival (see ``ops.consolidation``)."""
    scale = tl.rsqrt(tl.sum(memory * memory) / size + _TINY)
    keep = sigmoid(tl.abs(memory) * (scale / temperature) - threshold / temperature)
    excess = force * (gamma_boost - 1) * forgetting
    return scale, keep, excess, tl.exp2((excess * LOG2_E) * (keep - 1))


@_kernel
def unit_rms(x, size, tiny):
    """Return x divided by its rms, and the rms."""
    mean_square = tl.sum(x * x) / size + tiny
    inverse = tl.rsqrt(mean_square)
    return x * inverse, mean_square * inverse


@_kernel
def rotate(basis, x):
    """``basis @ x``: numbers of unit rms are held by float16 as well as by tf32, whose products cost twice as much."""
    return tl.dot(basis, x.to(basis.dtype), input_precision=PRECISION)


@_kernel
def resonate(memory, basis, sharpness, bias, energy, K, V):
    """Modes of a memory in units of its rms, their energies relative to the mean, the gate, and the rms."""
    unit, rms = unit_rms(memory, K * V, _TINY)
    modes = rotate(tl.trans(basis), unit)
    relative = tl.sum(modes * modes, 1) / V  # the basis is orthonormal: the mean energy of unit rms is V
    return modes, relative, sigmoid(sharpness * (relative - energy) + bias), rms


@_kernel
def _beside(x, other):
    """Return x in the registers of the threads that hold ``other``.

    A loaded block lies elsewhere than the result of a product; and where the two meet late, the compiler moves all that
    was computed from one of them, not the one.
    """
    return x + 0.0 * other


@_kernel
def _filtered(memory, writes, forgetting, force, threshold, temperature, gamma_boost, eta_boost, size):
    """A memory behind the SNR filter."""
    _, keep, _, survival = snr_factors(memory, forgetting, force, threshold, temperature, gamma_boost, size)
    return memory * survival + (force * (eta_boost - 1)) * (keep * writes)


@_kernel
def consolidate(
    memory, writes, forgetting, force, basis, sharpness, bias, threshold, temperature, gamma_boost, eta_boost, energy,
    K, V, SNR: tl.constexpr, RESONANCE: tl.constexpr,
):  # fmt: skip
    if SNR:
        memory = _filtered(memory, writes, forgetting, force, threshold, temperature, gamma_boost, eta_boost, K * V)
    if RESONANCE:
        modes, _, gate, rms = resonate(memory, basis, sharpness, bias, energy, K, V)
        memory = rotate(basis, gate[:, None] * modes) * rms
    return memory


@_kernel
def _resonance_back(grad, memory, basis, sharpness, bias, energy, K, V):
    """Gradients of a memory in front of the resonance, and of the sharpness and the bias by mode."""
    modes, relative, gate, rms = resonate(memory, basis, sharpness, bias, energy, K, V)
    unit, grad_rms = unit_rms(grad, K * V, _LEAST)
    grad_modes = rotate(tl.trans(basis), unit)
    grad_bias = tl.sum(grad_modes * modes, 1) * (gate * (1 - gate) * (grad_rms * rms))
    grad_sharpness = grad_bias * (relative - energy)
    grad_relative = sharpness * grad_bias
    grad_energy = (grad_relative - tl.sum(grad_relative * relative) / K) * (2 / (V * rms))
    grad_modes = grad_modes * (gate * grad_rms)[:, None] + modes * grad_energy[:, None]
    unit, grad_rms = unit_rms(grad_modes, K * V, _LEAST)
    return rotate(basis, unit) * grad_rms, grad_sharpness, grad_bias


@_kernel
def consolidate_back(
    grad, memories, writes, square, in_square, forgetting, force, basis, sharpness, bias,
    threshold, temperature, gamma_boost, eta_boost, energy, K, V, BK: tl.constexpr, SNR: tl.constexpr,
    STRENGTH: tl.constexpr, RESONANCE: tl.constexpr,
):  # fmt: skip
    """Return the gradients of the memory, the writes, Γ̄ and the strength, and of the sharpness and the bias by mode.

    The last value is the product of the writes' gradient with what the memory holds beside them.

    Memory and writes are read twice, where they lie, rather than held: a program has few registers left.
    """
    grad_sharpness, grad_bias = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
    grad_writes, grad_forgetting, grad_strength, of_left = tl.zeros_like(grad), 0.0, 0.0, 0.0
    if RESONANCE:
        memory = _beside(tl.load(memories + square, mask=in_square, other=0.0), grad)
        if SNR:
            wrote = _beside(tl.load(writes + square, mask=in_square, other=0.0), grad)
            memory = _filtered(memory, wrote, forgetting, force, threshold, temperature, gamma_boost, eta_boost, K * V)
        grad, grad_sharpness, grad_bias = _resonance_back(grad, memory, basis, sharpness, bias, energy, K, V)
    if SNR:
        memory = _beside(tl.load(memories + square, mask=in_square, other=0.0, volatile=True), grad)
        wrote = _beside(tl.load(writes + square, mask=in_square, other=0.0, volatile=True), grad)
        scale, keep, excess, survival = snr_factors(
            memory, forgetting, force, threshold, temperature, gamma_boost, K * V
        )
        grad_writes = (force * (eta_boost - 1)) * (keep * grad)
        of_left += tl.sum(grad_writes * (memory - wrote))
        wrote *= grad
        grad = grad * survival
        grad_exponent = grad * memory
        of_boost = (gamma_boost - 1) * tl.sum((keep - 1) * grad_exponent)
        grad_forgetting += force * of_boost
        if STRENGTH:
            grad_strength += forgetting * of_boost + (eta_boost - 1) * tl.sum(keep * wrote)
        grad_keep = excess * grad_exponent + (force * (eta_boost - 1)) * wrote
        grad_ratio = grad_keep * (keep * (1 - keep) * (1 / temperature))
        # In units of the rms: the cube of the scale leaves the range of float32 before the memory's square does.
        from_scale = tl.sum(grad_ratio * (tl.abs(memory) * scale)) * (scale * scale / (K * V))
        grad_ratio = tl.where(memory < 0, -grad_ratio, tl.where(memory > 0, grad_ratio, 0.0))
        grad = grad + grad_ratio * scale - from_scale * memory
    return grad, grad_writes, grad_forgetting, grad_strength, grad_sharpness, grad_bias, of_left


def parts_of(consolidation: Consolidation | None) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """Return the tensors of the filters, and ``interval``, ``snr`` and ``energy`` as the operators have them.

    The tensors are the strength of the SNR filter, and the basis, sharpness and bias of the resonance.
    """
    snr = consolidation.snr if consolidation else None
    resonance = consolidation.resonance if consolidation else None
    modes = (resonance.basis, resonance.sharpness, resonance.bias) if resonance else (None, None, None)
    return (snr.strength if snr else None, *modes), dict(
        interval=consolidation.interval if consolidation and (snr or resonance) else 0,
        snr=[snr.threshold, snr.temperature, snr.gamma_boost, snr.eta_boost] if snr else [],
        energy=resonance.threshold if resonance else 0.0,
    )


def constants_of(snr: list[float], energy: float, interval: int) -> tuple[float | int, ...]:
    """The numbers of the consolidation, as the kernels take them."""
    return *(snr or (0.0, 1.0, 1.0, 1.0)), energy, interval
