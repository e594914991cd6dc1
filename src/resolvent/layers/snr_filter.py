"""SNR memory filter: components of a memory below a signal-to-noise threshold decay faster.

Shapes: B batch, H heads, K key width, V value width.
"""

import torch
from torch import Tensor, nn

from ..ops import SNRFilter
from ..ops.consolidation import signal_to_noise
from ..ops.precision import at_least_float32


class SNRMemoryFilter(nn.Module):
    """Filter of a memory at every consolidation (``ops.consolidation``).

    Noise decays faster, and signal is written more strongly.

    It starts near the identity: its strength is ``sigmoid(strength_logit)``, and training raises it where it helps.

    Args:
        num_heads: heads H.
        threshold: SNR, in units of the memory's rms, above which a component counts as signal.
        gamma_boost: factor of the decay rate of noise at full strength, >= 1.
        eta_boost: factor of the learning rate of signal at full strength, >= 1.
        temperature: softness of the threshold.
        trained: train the strength; False for full strength.
        paired: the memory rotates, and its components are pairs of rows.
    """

    def __init__(
        self,
        num_heads: int,
        threshold: float = 2.0,
        gamma_boost: float = 2.0,
        eta_boost: float = 1.5,
        temperature: float = 0.5,
        trained: bool = True,
        paired: bool = False,
    ):
        super().__init__()
        self.threshold, self.temperature = threshold, temperature
        self.gamma_boost, self.eta_boost, self.paired = gamma_boost, eta_boost, paired
        self.strength_logit = nn.Parameter(torch.empty(num_heads)) if trained else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.strength_logit is not None:
            self.strength_logit.fill_(-6.0)

    def forward(self) -> SNRFilter:
        """Return the operator's parameters. Call the module, not ``constants()``: FSDP gathers weights in a hook."""
        return self.constants()

    def constants(self) -> SNRFilter:
        """Return the parameters of the operator."""
        return SNRFilter(self.threshold, self.temperature, self.gamma_boost, self.eta_boost, self.strength)

    @property
    def strength(self) -> Tensor | None:
        """Strength of the filter per head, (H,) float32 or wider, in [0, 1]; None for full strength."""
        return None if self.strength_logit is None else at_least_float32(self.strength_logit).sigmoid()

    @property
    def amplification(self) -> Tensor:
        """Largest factor of a memory, ``A = 1 / (1 - s (1 - 1 / eta_boost))``: (H,), or () at full strength."""
        strength = torch.ones(()) if self.strength is None else self.strength
        return 1 / (1 - strength * (1 - 1 / self.eta_boost))

    def extra_repr(self) -> str:
        names = ("threshold", "temperature", "gamma_boost", "eta_boost")
        return ", ".join(f"{name}={getattr(self, name):g}" for name in names)

    def statistics(self, memory: Tensor) -> dict[str, Tensor]:
        """Return statistics of a memory (B, H, K, V), each (B, H).

        They are ``mean_snr``, ``std_snr``, ``min_snr``, ``max_snr``, ``low_snr_ratio`` (the share of components below
        the threshold) and the ``strength`` of the filter.
        """
        snr, strength = signal_to_noise(memory, self.paired).flatten(-2), self.strength
        return {
            "mean_snr": snr.mean(-1),
            "std_snr": snr.std(-1),
            "min_snr": snr.amin(-1),
            "max_snr": snr.amax(-1),
            "low_snr_ratio": (snr < self.threshold).float().mean(-1),
            "strength": (snr.new_ones(1) if strength is None else strength).expand(snr.shape[:-1]),
        }
