"""Memory resonance: damping of the weak modes of a memory in the basis of the zeta zeros.

Shapes: B batch, H heads, K key width, V value width.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..ops import Resonance
from ..ops.consolidation import mode_energies, modes, resonance_gate
from .zeta import ExactConstant, resonance_basis


class MemoryResonanceLayer(nn.Module):
    """Filter that damps modes of little energy at every consolidation (``ops.consolidation``).

    It starts near the identity: ``bias`` opens the gate of every mode, and training closes gates.

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
        self.basis = ExactConstant(partial(resonance_basis, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.sharpness.fill_(1.0)
        self.bias.fill_(4.0)

    def forward(self) -> Resonance:
        """Return the operator's parameters. Call the module, not ``constants()``: FSDP gathers weights in a hook."""
        return self.constants()

    def constants(self) -> Resonance:
        """Return the parameters of the operator."""
        return Resonance(self.basis.value, self.energy_threshold, self.sharpness, self.bias)

    def statistics(self, memory: Tensor) -> dict[str, Tensor]:
        """Return statistics of the modes of a memory (B, H, K, V), in the frame that turns with the tokens.

        Per mode (B, H, K): ``diag_energy`` (relative to the mean of the modes), ``gate`` (the factor) and
        ``resonance_mask`` (energy above the threshold). Per head (B, H): ``num_resonant``, ``total_energy`` and
        ``sparsity_ratio`` (the share of modes that do not resonate).
        """
        energies = mode_energies(modes(memory, self.basis.value))
        mask = energies > self.energy_threshold
        return {
            "diag_energy": energies,
            "gate": resonance_gate(energies, self.constants()),
            "resonance_mask": mask,
            "num_resonant": mask.sum(-1),
            "total_energy": memory.square().sum(dim=(-2, -1)),
            "sparsity_ratio": 1 - mask.float().mean(-1),
        }
