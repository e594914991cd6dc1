"""What happens inside a model in training, as a few numbers and distributions.

Shapes: N tokens, H heads, K = V head width.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from resolvent.models import IntegratedModel
from resolvent.models.generation import evaluating
from resolvent.models.phase1 import Phase1IntegratedModel
from resolvent.models.phase2 import Phase2IntegratedModel, Phase2State
from resolvent.ops.consolidation import signal_to_noise
from resolvent.training.sharding import whole_tensor


@dataclass
class Physics:
    """Scalars and distributions, by name."""

    scalars: dict[str, float]
    histograms: dict[str, Tensor]


@torch.no_grad()
def read_physics(model: IntegratedModel, tokens: Tensor) -> Physics:
    """Let a model read a text, in evaluation mode, and look inside.

    Args:
        model: the model.
        tokens: int64 (N,).

    Returns:
        By layer, of a Phase 2 model: the decay rates Γ of all tokens; how strongly the SNR filter acts; and of the
        memories after the text their SNR, energy, the largest energy as a part of its bound, and the modes' energies
        with the share that resonates. Of a Phase 1 model: its gates, their effective rank, and how near the resolvent
        came to a pole.
    """
    found: dict[str, Any] = {}
    with evaluating(model):
        reader = cast(Phase1IntegratedModel | Phase2IntegratedModel, model)
        _, state = reader.hidden_states(tokens[None], diagnostics=found)
    return _phase2(found, state) if isinstance(state, Phase2State) else _phase1(found)


def gradient_norms(model: IntegratedModel) -> dict[str, float]:
    """Norm of the gradient of every layer, and of what is not in a layer, by name."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            first, second, *_ = name.split(".")
            group = _name("gradient_norm", int(second)) if first == "blocks" else f"gradient_norm/{first}"
            groups.setdefault(group, []).append(parameter.grad)
    return {group: whole_tensor(get_total_norm(gradients)).item() for group, gradients in groups.items()}


def _name(quantity: str, layer: int) -> str:
    return f"{quantity}/layer_{layer + 1:02d}"


def _phase2(found: dict[str, Any], state: Phase2State) -> Physics:
    scalars, histograms = {}, {}
    for i, layer in enumerate(state.layers):
        gamma, stability = found["gamma_values"][i], found["stability_metrics"][i]
        snr, resonance = found["snr_stats"][i], found["resonance_info"][i]
        histograms[_name("gamma", i)] = gamma
        scalars[_name("gamma_mean", i)] = gamma.mean().item()
        scalars[_name("energy", i)] = stability["energy"].mean().item()
        scalars[_name("energy_over_bound", i)] = (stability["energy"] / stability["energy_bound"]).max().item()
        histograms[_name("snr", i)] = signal_to_noise(layer.memory.memory)
        if snr:
            scalars[_name("signal_share", i)] = 1 - snr["low_snr_ratio"].mean().item()
            scalars[_name("snr_strength", i)] = snr["strength"].mean().item()
        if resonance:
            scalars[_name("resonant_share", i)] = 1 - resonance["sparsity_ratio"].mean().item()
            histograms[_name("mode_energy", i)] = resonance["diag_energy"]
    return Physics(scalars, histograms)


def _phase1(found: dict[str, Any]) -> Physics:
    scalars = {
        _name(quantity, i): value.item()
        for quantity in ("effective_rank", "gate_sparsity")
        for i, value in enumerate(found[quantity])
    }
    for i, metrics in enumerate(found["stability_metrics"]):
        scalars |= {_name(quantity, i): value.item() for quantity, value in metrics.items()}
    return Physics(scalars, {_name("gate", i): gate for i, gate in enumerate(found["gate_values"])})
