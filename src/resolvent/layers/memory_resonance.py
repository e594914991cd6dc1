"""Memory resonance: the modes of a memory in the basis of the zeta zeros, and which of them ring on.

Shapes: B batch, H heads, K key width, V value width.
"""

import torch
from torch import Tensor, nn

from ..ops import Resonance
from ..ops.consolidation import mode_energies, modes, resonance_gate
from .zeta import ExactConstant, resonance_basis


class MemoryResonanceLayer(nn.Module):
    """At every consolidation, modes with little energy are damped (``ops.consolidation``).

    It starts near the identity: ``bias`` opens every mode's gate, and training closes what does not help.

    Args:
        num_heads: heads H.
        head_dim: key width K, the number of modes.
        energy_threshold: energy, in units of the mean over modes, above which a mode resonates.
    """

    def __init__(self, num_heads: int, head_dim: int, energy_threshold: float = 0.1):
        super().__init__()
        self.energy_threshold = energy_threshold
        self.sharpness = nn.Parameter(torch.empty(num_heads))
        self.bias = nn.Parameter(torch.empty(num_heads))
        self.basis = ExactConstant(lambda: resonance_basis(head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.sharpness.fill_(1.0)
        self.bias.fill_(4.0)

    def forward(self) -> Resonance:
        """What the operator needs: ``constants``, through the module's hooks, which may have to fetch its weights."""
        return self.constants()

    def constants(self) -> Resonance:
        """What the operator needs."""
        return Resonance(self.basis.value, self.energy_threshold, self.sharpness, self.bias)

    def statistics(self, memory: Tensor) -> dict[str, Tensor]:
        """What the layer sees in a memory (B, H, K, V).

        Returns per mode (B, H, K) ``diag_energy`` (relative to the modes' mean), ``gate`` (its factor) and
        ``resonance_mask`` (energy above the threshold), and per head (B, H) ``num_resonant``, ``total_energy`` and
        ``sparsity_ratio`` (the share of modes that do not resonate).
        """
        energy = mode_energies(modes(memory, self.basis.value))
        mask = energy > self.energy_threshold
        return {
            "diag_energy": energy,
            "gate": resonance_gate(energy, self.constants()),
            "resonance_mask": mask,
            "num_resonant": mask.sum(-1),
            "total_energy": memory.square().sum(dim=(-2, -1)),
            "sparsity_ratio": 1 - mask.float().mean(-1),
        }
