r"""Consolidation: what happens to a Hebbian memory at fixed boundaries, every ``interval`` tokens of a sequence.

Let ``S`` be the memory at a boundary, ``ΔS`` the decayed sum of what was written since the last one and ``Γ̄`` the sum
of ``Γ dt`` since then.

* **SNR filter.** ``SNR_ij = |S_ij| / rms(S)`` per head and ``p = sigmoid((SNR - threshold) / temperature)``. At full
  strength, s = 1, components below the threshold forget as if Γ were ``gamma_boost`` times as large, those above it
  learn as if η were ``eta_boost`` times as large; at s = 0 nothing happens:
  ``S <- S exp(-s (gamma_boost - 1) Γ̄ (1 - p)) + s (eta_boost - 1) p ΔS``.
* **Resonance.** The modes of a memory are the rows of ``QᵀS`` for a fixed orthonormal ``Q``, with energies ``E_m``
  relative to their mean; ``S <- Q diag(σ) QᵀS`` with ``σ_m = sigmoid(sharpness (E_m / mean(E) - threshold) + bias)``.

With ``base_decay > 0`` and ``σ <= 1`` the memory stays bounded (see ``layers.hebbian.LyapunovStabilityMonitor``).
Shapes: B batch, H heads, K key width, V value width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-20
"""Added to a mean square, so that an empty memory has SNR 0 and energy 0: no state that was written is that small."""


@dataclass(frozen=True)
class SNRFilter:
    """Parameters of the SNR filter.

    They are the threshold (in units of the memory's rms), the softness, the two boosts (>= 1), and the ``strength`` s
    in [0, 1] with which it acts on every head, (H,); None for full strength everywhere.
    """

    threshold: float
    temperature: float
    gamma_boost: float
    eta_boost: float
    strength: Tensor | None = None


@dataclass(frozen=True)
class Resonance:
    """The resonance filter: orthonormal ``basis`` Q (K, K), energy threshold, ``sharpness`` and ``bias`` (H,)."""

    basis: Tensor
    threshold: float
    sharpness: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Consolidation:
    """What acts at a boundary, and how many tokens lie between two of them (a multiple of the chunk of 64)."""

    interval: int
    snr: SNRFilter | None = None
    resonance: Resonance | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Tensors that have gradients, each (H,).

        They are the SNR filter's strength, if it has one, and the resonance's sharpness and bias, if there is one.
        """
        strength = (self.snr.strength,) if self.snr is not None and self.snr.strength is not None else ()
        return (*strength, self.resonance.sharpness, self.resonance.bias) if self.resonance is not None else strength


def signal_to_noise(memory: Tensor) -> Tensor:
    """``|S_ij| / rms(S)`` per head: (..., K, V) -> (..., K, V)."""
    mean_square = memory.square().mean(dim=(-2, -1), keepdim=True)
    return memory.abs() * torch.rsqrt(mean_square + _TINY)


def modes(memory: Tensor, basis: Tensor) -> Tensor:
    """``(QᵀS)ᵀ``: memory (..., K, V), basis (K, K) -> (..., V, K), a mode a column."""
    return memory.mT @ basis.to(memory.dtype)


def mode_energies(modes_VK: Tensor) -> Tensor:
    """Energies of the modes (..., V, K) relative to their mean, (..., K)."""
    energy = modes_VK.square().sum(-2)
    return energy / (energy.mean(-1, keepdim=True) + _TINY)


def resonance_gate(energies: Tensor, resonance: Resonance) -> Tensor:
    """The factor σ in (0, 1) of every mode: relative energies (..., H, K) -> (..., H, K)."""
    sharpness, bias = (p.to(energies.dtype).unsqueeze(-1) for p in (resonance.sharpness, resonance.bias))
    return torch.sigmoid(sharpness * (energies - resonance.threshold) + bias)


def consolidate(memory: Tensor, writes: Tensor, forgetting: Tensor, consolidation: Consolidation) -> Tensor:
    """Filter a memory at a boundary. The caller then restarts ``writes`` and ``forgetting`` at zero.

    Args:
        memory: S, (B, H, K, V).
        writes: ΔS, the decayed sum of the writes since the last boundary, (B, H, K, V).
        forgetting: Γ̄, the sum of Γ dt since the last boundary, (B, H).
        consolidation: which mechanisms act, with their constants.

    Returns:
        The consolidated memory, (B, H, K, V).
    """
    if (snr := consolidation.snr) is not None:
        memory = _filtered(memory, writes, _snr_factors(memory, forgetting, snr), snr)
    if (resonance := consolidation.resonance) is not None:
        modes_VK = modes(memory, resonance.basis)
        gate = resonance_gate(mode_energies(modes_VK), resonance)
        memory = ((gate.unsqueeze(-2) * modes_VK) @ resonance.basis.to(memory.dtype).T).mT
    return memory


class _SNRFactors(NamedTuple):
    """Return the terms of the SNR filter for a memory.

    They are ``p`` and ``exp(-excess (1 - p))``, both (B, H, K, V), and the scale ``1 / rms`` and the excess ``s
    (gamma_boost - 1) Γ̄``, both (B, H, 1, 1).
    """

    keep: Tensor
    survival: Tensor
    scale: Tensor
    excess: Tensor


def _snr_factors(memory: Tensor, forgetting: Tensor, snr: SNRFilter) -> _SNRFactors:
    scale = torch.rsqrt(memory.square().mean(dim=(-2, -1), keepdim=True) + _TINY)
    keep = torch.sigmoid(memory.abs() * (scale / snr.temperature) - snr.threshold / snr.temperature)
    excess = _at_strength((snr.gamma_boost - 1) * forgetting[..., None, None], snr)
    return _SNRFactors(keep, torch.exp(excess * (keep - 1)), scale, excess)


def _filtered(memory: Tensor, writes: Tensor, factors: _SNRFactors, snr: SNRFilter) -> Tensor:
    learned = _at_strength(factors.keep, snr)
    return torch.addcmul(memory * factors.survival, learned, writes, value=snr.eta_boost - 1)


def _at_strength(x: Tensor, snr: SNRFilter) -> Tensor:
    """``s x``: (B, H, ., .) -> the same."""
    return x if snr.strength is None else x * snr.strength.to(x.dtype)[:, None, None]


class ConsolidationGradient(NamedTuple):
    """Gradients of ``consolidate`` in its inputs and in ``Consolidation.parameters``, in their order."""

    memory: Tensor
    writes: Tensor
    forgetting: Tensor
    parameters: tuple[Tensor, ...]


def consolidate_gradient(
    grad: Tensor, memory: Tensor, writes: Tensor, forgetting: Tensor, consolidation: Consolidation
) -> ConsolidationGradient:
    """The adjoint of ``consolidate``, written out: autograd would keep a dozen memories for every boundary.

    ``grad`` is the gradient of the consolidated memory, (B, H, K, V); the other arguments are those of ``consolidate``.
    """
    snr, resonance = consolidation.snr, consolidation.resonance
    factors = _snr_factors(memory, forgetting, snr) if snr is not None else None
    parameters: tuple[Tensor, ...] = ()
    if resonance is not None:
        unfiltered = memory if snr is None or factors is None else _filtered(memory, writes, factors, snr)
        grad, *grads = _resonance_gradient(grad, unfiltered, resonance)
        parameters = tuple(grads)
    if snr is None or factors is None:
        return ConsolidationGradient(grad, torch.zeros_like(writes), torch.zeros_like(forgetting), parameters)

    keep, survival, scale, excess = factors
    direct, weighted = grad * survival, _at_strength(grad, snr)
    grad_exponent = direct * memory
    grad_keep = torch.addcmul(excess * grad_exponent, writes, weighted, value=snr.eta_boost - 1)
    grad_ratio = torch.ops.aten.sigmoid_backward(grad_keep, keep) / snr.temperature
    # In units of the rms: the cube of a scale leaves the range of float32 long before the memory's square does.
    along = (grad_ratio * memory.abs() * scale).sum(dim=(-2, -1), keepdim=True)
    from_scale = along * scale.square() / memory[0, 0].numel()
    grad_memory = torch.addcmul(direct, grad_ratio * scale, torch.sign(memory)).addcmul_(from_scale, memory, value=-1)
    grad_excess = ((keep - 1) * grad_exponent).sum(dim=(-2, -1), keepdim=True)
    if snr.strength is not None:
        of_forgetting = (snr.gamma_boost - 1) * forgetting * grad_excess[..., 0, 0]
        of_learning = (snr.eta_boost - 1) * (keep * writes * grad).sum(dim=(-2, -1))
        parameters = ((of_forgetting + of_learning).sum(0), *parameters)
    return ConsolidationGradient(
        grad_memory,
        (snr.eta_boost - 1) * (keep * weighted),
        (snr.gamma_boost - 1) * _at_strength(grad_excess, snr)[..., 0, 0],
        parameters,
    )


def _resonance_gradient(grad: Tensor, memory: Tensor, resonance: Resonance) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint of the resonance filter: gradients of the memory (B, H, K, V), of the sharpness and of the bias (H,)."""
    basis = resonance.basis.to(memory.dtype)
    modes_VK = modes(memory, basis)
    energy = modes_VK.square().sum(-2)
    mean = energy.mean(-1, keepdim=True) + _TINY
    relative = energy / mean
    gate = resonance_gate(relative, resonance)

    grad_modes = grad.mT @ basis
    grad_logit = (grad_modes * modes_VK).sum(-2) * gate * (1 - gate)
    grad_relative = resonance.sharpness.to(memory.dtype).unsqueeze(-1) * grad_logit
    correlation = (grad_relative * relative).mean(-1, keepdim=True)
    grad_energy = (grad_relative - correlation) / mean
    grad_modes = grad_modes * gate.unsqueeze(-2) + 2 * modes_VK * grad_energy.unsqueeze(-2)
    grad_sharpness = (grad_logit * (relative - resonance.threshold)).sum(dim=(0, -1))
    return (grad_modes @ basis.T).mT, grad_sharpness, grad_logit.sum(dim=(0, -1))
