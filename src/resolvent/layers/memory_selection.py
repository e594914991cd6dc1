"""SNR memory filter: which components of a memory are signal, and which are noise that may fade.

Shapes: B batch, H heads, K key width, V value width.
"""

from torch import Tensor, nn

from ..ops import SNRFilter
from ..ops.consolidation import signal_to_noise


class SNRMemoryFilter(nn.Module):
    """At every consolidation, noise forgets faster and signal is written more strongly (``ops.consolidation``).

    Args:
        threshold: SNR, in units of the memory's rms, above which a component counts as signal.
        gamma_boost: how many times faster noise forgets, >= 1.
        eta_boost: how many times more strongly signal is learned, >= 1.
        temperature: softness of the threshold.
    """

    def __init__(
        self, threshold: float = 2.0, gamma_boost: float = 2.0, eta_boost: float = 1.5, temperature: float = 0.5
    ):
        super().__init__()
        self.constants = SNRFilter(threshold, temperature, gamma_boost, eta_boost)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in vars(self.constants).items())

    def statistics(self, memory: Tensor) -> dict[str, Tensor]:
        """What the filter sees in a memory (B, H, K, V): ``mean_snr``, ``std_snr``, ``min_snr``, ``max_snr`` and
        ``low_snr_ratio`` (the share of components below the threshold), each (B, H)."""
        snr = signal_to_noise(memory).flatten(-2)
        return {
            "mean_snr": snr.mean(-1),
            "std_snr": snr.std(-1),
            "min_snr": snr.amin(-1),
            "max_snr": snr.amax(-1),
            "low_snr_ratio": (snr < self.constants.threshold).float().mean(-1),
        }
