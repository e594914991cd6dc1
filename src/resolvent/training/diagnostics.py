"""Diagnostics of a model in training: scalars and distributions for trackers.

Shapes: N tokens, H heads, K = V head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from resolvent.models import IntegratedModel, observe
from resolvent.models.inference import inference_view
from resolvent.models.phase1 import Phase1Diagnostics, Phase1IntegratedModel
from resolvent.models.phase2 import Phase2Diagnostics, Phase2IntegratedModel, Phase2State
from resolvent.ops.consolidation import signal_to_noise
from resolvent.training.sharding import whole_tensor


@dataclass
class Diagnostics:
    """Scalars and distributions, by name."""

    scalars: dict[str, float]
    histograms: dict[str, Tensor]


@torch.no_grad()
def read_diagnostics(model: IntegratedModel, tokens: Tensor) -> Diagnostics:
    """Read a text without dropout and summarise the computations of the layers.

    Args:
        model: the model.
        tokens: int64 (N,).

    Returns:
        By layer, of a Phase 2 model: the decay rates Γ of all tokens; the strength of the SNR filter; and of the
        memories after the text their SNR, energy, the largest energy as a fraction of its bound, and the modes'
        energies with the share that resonates. Of a Phase 1 model: the gates, their effective rank, and the distance of
        the resolvent from a pole.
    """
    model = inference_view(model)
    if isinstance(model, Phase2IntegratedModel):
        trace = observe(model, tokens[None])
        return _phase2(model.diagnostics(trace), trace.after)
    assert isinstance(model, Phase1IntegratedModel)
    return _phase1(model.diagnostics(observe(model, tokens[None])))


def gradient_norms(model: IntegratedModel) -> dict[str, float]:
    """Return the gradient norm of every layer, and of every part outside the layers, by name."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            first, second, *_ = name.split(".")
            group = _name("gradient_norm", int(second)) if first == "blocks" else f"gradient_norm/{first}"
            groups.setdefault(group, []).append(parameter.grad)
    return {group: whole_tensor(get_total_norm(gradients)).item() for group, gradients in groups.items()}


def _name(quantity: str, layer: int) -> str:
    return f"{quantity}/layer_{layer + 1:02d}"


def _phase2(found: Phase2Diagnostics, state: Phase2State) -> Diagnostics:
    scalars, histograms = {}, {}
    for i, layer in enumerate(state.layers):
        gamma, stability = found["gamma_values"][i], found["stability_metrics"][i]
        snr, resonance = found["snr_stats"][i], found["resonance_info"][i]
        if gamma is not None:
            histograms[_name("gamma", i)] = gamma
            scalars[_name("gamma_mean", i)] = gamma.mean().item()
        if layer.memory is None:  # it attends
            continue
        scalars[_name("energy", i)] = stability["energy"].mean().item()
        scalars[_name("energy_over_bound", i)] = (stability["energy"] / stability["energy_bound"]).max().item()
        histograms[_name("snr", i)] = signal_to_noise(layer.memory.memory, paired=layer.phases is not None)
        if snr:
            scalars[_name("signal_share", i)] = 1 - snr["low_snr_ratio"].mean().item()
            scalars[_name("snr_strength", i)] = snr["strength"].mean().item()
        if resonance:
            scalars[_name("resonant_share", i)] = 1 - resonance["sparsity_ratio"].mean().item()
            histograms[_name("mode_energy", i)] = resonance["diag_energy"]
    return Diagnostics(scalars, histograms)


def _phase1(found: Phase1Diagnostics) -> Diagnostics:
    scalars = {
        _name(quantity, i): value.item()
        for quantity in ("effective_rank", "gate_sparsity")
        for i, value in enumerate(found[quantity])
    }
    for i, metrics in enumerate(found["stability_metrics"]):
        scalars |= {_name(quantity, i): value.item() for quantity, value in metrics.items()}
    return Diagnostics(scalars, {_name("gate", i): gate for i, gate in enumerate(found["gate_values"])})
