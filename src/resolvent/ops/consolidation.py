r"""Consolidation of a Hebbian memory at fixed boundaries, every ``interval`` tokens of a sequence.

Let ``S`` be the memory at a boundary and ``Γ̄`` the sum of ``Γ dt`` since the last one; nothing else is needed.

* **SNR filter.** ``SNR_ij = |S_ij| / rms(S)`` per head, ``p = sigmoid((SNR - threshold) / temperature)``, and

      S <- S / (1 + m (1 - exp(-Γ̄))),      m = s [(gamma_boost - 1) (1 - p) - (1 - 1 / eta_boost) p].

  To first order in Γ̄, components below the threshold forget as if Γ were ``gamma_boost`` times as large, and components
  above it learn as if η were ``eta_boost`` times as large, both in proportion to the strength s; at s = 0 the filter is
  the identity. With constant Γ and p the memory settles at ``W / (1 + m)``, where W is where it settles without the
  filter: at s = 1, ``W / gamma_boost`` for noise and ``eta_boost W`` for signal. A component that was written shortly
  before a boundary is changed little, as is a memory that forgets little from boundary to boundary.
* **Resonance.** The modes of a memory are the rows of ``QᵀS`` for a fixed orthonormal ``Q``, with energies ``E_m``
  relative to their mean; ``S <- Q diag(σ) QᵀS`` with ``σ_m = sigmoid(sharpness (E_m / mean(E) - threshold) + bias)``.

Both keep a memory bounded (see ``layers.hebbian.LyapunovStabilityMonitor``). Where queries and keys are rotated
(``ops.memory_rotation``), ``|S_ij|`` is the modulus of a pair of rows and the resonance acts in the frame that turns
with the tokens, ``S <- R(Φ) Q diag(σ) Qᵀ R(-Φ) S``: a constant added to all phases changes nothing.

Shapes: B batch, H heads, K key width, V value width, P = K / 2 pairs.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .memory_rotation import angles_of, quarter_turn_product, rotate_memory

_TINY = 1e-20
"""Added to a mean square, so that an empty memory has SNR 0 and energy 0; no memory that was written is that small."""


@dataclass(frozen=True)
class SNRFilter:
    """Parameters of the SNR filter.

    Attributes:
        threshold: SNR above which a component counts as signal, in units of the memory's rms.
        temperature: softness of the threshold.
        gamma_boost: factor of Γ for noise at full strength, >= 1.
        eta_boost: factor of η for signal at full strength, >= 1.
        strength: s in [0, 1] per head, (H,); None for full strength.
    """

    threshold: float
    temperature: float
    gamma_boost: float
    eta_boost: float
    strength: Tensor | None = None


@dataclass(frozen=True)
class Resonance:
    """Parameters of the resonance filter.

    Attributes:
        basis: orthonormal Q, (K, K).
        threshold: energy above which a mode resonates, relative to the mean over the modes.
        sharpness: slope of the gate per head, (H,).
        bias: bias of the gate per head, (H,).
    """

    basis: Tensor
    threshold: float
    sharpness: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Consolidation:
    """Filters that act at the boundaries.

    Attributes:
        interval: tokens between two boundaries, a multiple of the chunk of 64.
        snr: the SNR filter, which acts first; None for none.
        resonance: the resonance filter; None for none.
    """

    interval: int
    snr: SNRFilter | None = None
    resonance: Resonance | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Differentiable parameters, each (H,): the SNR filter's strength, then the resonance's sharpness and bias.

        A filter that is missing, or a strength of None, has none.
        """
        strength = (self.snr.strength,) if self.snr is not None and self.snr.strength is not None else ()
        return (*strength, self.resonance.sharpness, self.resonance.bias) if self.resonance is not None else strength


def signal_to_noise(memory: Tensor, paired: bool = False) -> Tensor:
    """Return ``|S_ij| / rms(S)`` per head, ``|S|`` the modulus of a pair if ``paired``: (..., K, V) -> (..., K, V)."""
    size = _modulus(memory, paired)
    return size * torch.rsqrt(size.square().mean(dim=(-2, -1), keepdim=True) + _TINY)


def _modulus(memory: Tensor, paired: bool) -> Tensor:
    """Return ``|S_ij|`` or, if ``paired``, the root of the sum of squares of rows j and j + K/2: (..., K, V)."""
    return _pair_sums(memory.square()).sqrt() if paired else memory.abs()


def _pair_sums(x: Tensor) -> Tensor:
    """Return the sum of rows j and j + K/2 in both of them: (..., K, V) -> (..., K, V)."""
    first, second = x.chunk(2, dim=-2)
    both = first + second
    return torch.cat([both, both], dim=-2)


def modes(memory: Tensor, basis: Tensor) -> Tensor:
    """Return ``(QᵀS)ᵀ``: memory (..., K, V), basis (K, K) -> (..., V, K), a mode per column."""
    return memory.mT @ basis.to(memory.dtype)


def mode_energies(modes_VK: Tensor) -> Tensor:
    """Return the energies of the modes (..., V, K) relative to their mean, (..., K)."""
    memory_energy_K = modes_VK.square().sum(-2)
    return memory_energy_K / (memory_energy_K.mean(-1, keepdim=True) + _TINY)


def resonance_gate(energies: Tensor, resonance: Resonance) -> Tensor:
    """Return the factor σ in (0, 1) of every mode: relative energies (..., H, K) -> (..., H, K)."""
    sharpness, bias = (p.to(energies.dtype).unsqueeze(-1) for p in (resonance.sharpness, resonance.bias))
    return torch.sigmoid(sharpness * (energies - resonance.threshold) + bias)


def consolidate(
    memory: Tensor, forgetting: Tensor, consolidation: Consolidation, phases: Tensor | None = None
) -> Tensor:
    """Filter a memory at a boundary. The caller then restarts ``forgetting`` at zero.

    Args:
        memory: S, (B, H, K, V).
        forgetting: Γ̄, the sum of Γ dt since the last boundary, (B, H).
        consolidation: filters and their parameters.
        phases: where queries and keys are rotated, the phases at the boundary, in turns (B, P).

    Returns:
        The consolidated memory, (B, H, K, V).

    Example:
        >>> memory, forgetting = torch.randn(3, 2, 16, 8), torch.rand(3, 2)  # a row per sequence, packed or not
        >>> rule = Consolidation(64, SNRFilter(threshold=2.0, temperature=0.5, gamma_boost=2.0, eta_boost=1.5))
        >>> consolidate(memory, forgetting, rule).shape
        torch.Size([3, 2, 16, 8])
    """
    # 1. SNR filter.
    if (snr := consolidation.snr) is not None:
        memory = memory / _snr_factors(memory, forgetting, snr, phases is not None).divisor_BHKV
    # 2. Resonance, in the frame that turns with the tokens.
    if (resonance := consolidation.resonance) is not None:
        if phases is None:
            return _resonated(memory, resonance)
        angles_BP = angles_of(phases, memory.dtype)
        memory = rotate_memory(_resonated(rotate_memory(memory, -angles_BP), resonance), angles_BP)
    return memory


def _resonated(memory: Tensor, resonance: Resonance) -> Tensor:
    """Take a memory into the basis of the modes, gate them, and go back."""
    modes_BHVK = modes(memory, resonance.basis)
    gate_BHK = resonance_gate(mode_energies(modes_BHVK), resonance)
    return ((gate_BHK.unsqueeze(-2) * modes_BHVK) @ resonance.basis.to(memory.dtype).T).mT


class _SNRFactors(NamedTuple):
    """Factors of the SNR filter for a memory.

    Attributes:
        keep_BHKV: ``p``.
        divisor_BHKV: ``1 + m (1 - exp(-Γ̄))``.
        size_BHKV: ``|S|``.
        scale_BH11: ``1 / rms``.
        forgotten_BH11: ``1 - exp(-Γ̄)``, times s.
    """

    keep_BHKV: Tensor
    divisor_BHKV: Tensor
    size_BHKV: Tensor
    scale_BH11: Tensor
    forgotten_BH11: Tensor


def _snr_factors(memory_BHKV: Tensor, forgetting_BH: Tensor, snr: SNRFilter, paired: bool) -> _SNRFactors:
    size_BHKV = _modulus(memory_BHKV, paired)
    scale_BH11 = torch.rsqrt(size_BHKV.square().mean(dim=(-2, -1), keepdim=True) + _TINY)
    keep_BHKV = torch.sigmoid(size_BHKV * (scale_BH11 / snr.temperature) - snr.threshold / snr.temperature)
    forgotten_BH11 = _at_strength(-torch.expm1(-forgetting_BH)[..., None, None], snr)
    damping, span = snr_slopes(snr)
    divisor_BHKV = 1 + forgotten_BH11 * (damping - span * keep_BHKV)
    return _SNRFactors(keep_BHKV, divisor_BHKV, size_BHKV, scale_BH11, forgotten_BH11)


def snr_slopes(snr: SNRFilter) -> tuple[float, float]:
    """Return a and b of ``m = s (a - b p)``."""
    return snr.gamma_boost - 1, snr.gamma_boost - 1 / snr.eta_boost


def _at_strength(x: Tensor, snr: SNRFilter) -> Tensor:
    """Return ``s x``: (B, H, ., .) -> the same."""
    return x if snr.strength is None else x * snr.strength.to(x.dtype)[:, None, None]


class ConsolidationGradient(NamedTuple):
    """Gradients of ``consolidate`` in its inputs and in ``Consolidation.parameters``, in their order."""

    memory: Tensor
    forgetting: Tensor
    phases: Tensor | None
    parameters: tuple[Tensor, ...]


def consolidate_gradient(
    grad: Tensor, memory: Tensor, forgetting: Tensor, consolidation: Consolidation, phases: Tensor | None = None
) -> ConsolidationGradient:
    """Compute the adjoint of ``consolidate``, written out: autograd would keep a dozen memories for every boundary.

    ``grad`` is the gradient of the consolidated memory, (B, H, K, V); the other arguments are those of ``consolidate``.
    """
    snr, resonance, paired = consolidation.snr, consolidation.resonance, phases is not None
    factors = _snr_factors(memory, forgetting, snr, paired) if snr is not None else None
    parameters: tuple[Tensor, ...] = ()
    grad_phases = None if phases is None else torch.zeros_like(phases)
    if resonance is not None:
        filtered = memory if factors is None else memory / factors.divisor_BHKV
        if phases is None:
            grad, *grads = _resonance_gradient(grad, filtered, resonance)
        else:
            grad, grad_phases, *grads = _turning_resonance_gradient(grad, filtered, resonance, phases)
        parameters = tuple(grads)
    if snr is None or factors is None:
        return ConsolidationGradient(grad, torch.zeros_like(forgetting), grad_phases, parameters)
    grad_memory, grad_forgetting, grad_strength = _snr_gradient(grad, memory, forgetting, factors, snr, paired)
    strength = () if snr.strength is None else (grad_strength,)
    return ConsolidationGradient(grad_memory, grad_forgetting, grad_phases, (*strength, *parameters))


def _snr_gradient(
    grad: Tensor, memory: Tensor, forgetting: Tensor, factors: _SNRFactors, snr: SNRFilter, paired: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the adjoint of the SNR filter: gradients of memory (B, H, K, V), Γ̄ (B, H) and strength (H,)."""
    keep_BHKV, divisor_BHKV, size_BHKV, scale_BH11, forgotten_BH11 = factors
    damping, span = snr_slopes(snr)
    # 1. Through the quotient, to the memory directly and to its divisor.
    direct_BHKV = grad / divisor_BHKV
    grad_divisor_BHKV = -direct_BHKV * (memory / divisor_BHKV)
    # 2. From the divisor to p, and through the ratio |S| / rms to the memory.
    grad_keep_BHKV = (-span * forgotten_BH11) * grad_divisor_BHKV
    grad_ratio_BHKV = torch.ops.aten.sigmoid_backward(grad_keep_BHKV, keep_BHKV) / snr.temperature
    # In units of the rms: the cube of a scale leaves the range of float32 long before the memory's square does.
    along_BH11 = (grad_ratio_BHKV * size_BHKV * scale_BH11).sum(dim=(-2, -1), keepdim=True)
    from_scale_BH11 = along_BH11 * scale_BH11.square() / memory[0, 0].numel()
    if paired:  # each row has a part in the moduli of two
        grad_ratio_BHKV, from_scale_BH11 = _pair_sums(grad_ratio_BHKV), 2 * from_scale_BH11
        direction_BHKV = torch.where(size_BHKV > 0, memory / size_BHKV, 0.0)
    else:
        direction_BHKV = torch.sign(memory)
    grad_memory = torch.addcmul(direct_BHKV, grad_ratio_BHKV * scale_BH11, direction_BHKV)
    grad_memory = grad_memory.addcmul_(from_scale_BH11, memory, value=-1)
    # 3. From the divisor to Γ̄ and the strength.
    grad_forgotten_BH = (grad_divisor_BHKV * (damping - span * keep_BHKV)).sum(dim=(-2, -1))
    grad_forgetting_BH = torch.exp(-forgetting) * _at_strength(grad_forgotten_BH[..., None, None], snr)[..., 0, 0]
    return grad_memory, grad_forgetting_BH, (-torch.expm1(-forgetting) * grad_forgotten_BH).sum(0)


def _turning_resonance_gradient(
    grad: Tensor, memory: Tensor, resonance: Resonance, phases: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the adjoint of the resonance in the turning frame: memory, phases (B, P), sharpness and bias (H,)."""
    angles_BP = angles_of(phases, memory.dtype)
    turned, grad = rotate_memory(memory, -angles_BP), rotate_memory(grad, -angles_BP)
    grad_turned, grad_sharpness, grad_bias = _resonance_gradient(grad, turned, resonance)
    # More phase turns what leaves the filter one way, and what enters it the other.
    grad_angles_BP = quarter_turn_product(grad, _resonated(turned, resonance)) - quarter_turn_product(
        grad_turned, turned
    )
    grad_phases = (2 * math.pi) * grad_angles_BP
    return rotate_memory(grad_turned, angles_BP), grad_phases.to(phases.dtype), grad_sharpness, grad_bias


def _resonance_gradient(grad: Tensor, memory: Tensor, resonance: Resonance) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the adjoint of the resonance: gradients of the memory (B, H, K, V), the sharpness and the bias (H,)."""
    basis_KK = resonance.basis.to(memory.dtype)
    modes_BHVK = modes(memory, basis_KK)
    memory_energy_BHK = modes_BHVK.square().sum(-2)
    mean_BH1 = memory_energy_BHK.mean(-1, keepdim=True) + _TINY
    relative_BHK = memory_energy_BHK / mean_BH1
    gate_BHK = resonance_gate(relative_BHK, resonance)

    grad_modes_BHVK = grad.mT @ basis_KK
    grad_logit_BHK = (grad_modes_BHVK * modes_BHVK).sum(-2) * gate_BHK * (1 - gate_BHK)
    grad_relative_BHK = resonance.sharpness.to(memory.dtype).unsqueeze(-1) * grad_logit_BHK
    correlation_BH1 = (grad_relative_BHK * relative_BHK).mean(-1, keepdim=True)
    grad_energy_BHK = (grad_relative_BHK - correlation_BH1) / mean_BH1
    grad_modes_BHVK = grad_modes_BHVK * gate_BHK.unsqueeze(-2) + 2 * modes_BHVK * grad_energy_BHK.unsqueeze(-2)
    grad_sharpness_H = (grad_logit_BHK * (relative_BHK - resonance.threshold)).sum(dim=(0, -1))
    return (grad_modes_BHVK @ basis_KK.T).mT, grad_sharpness_H, grad_logit_BHK.sum(dim=(0, -1))
