"""Range of seeds that both PyTorch and NumPy accept, without importing torch."""

from resolvent.errors import ConfigError
from resolvent.files import shown

MOST_SEED = 2**63 - 1
"""Largest seed; the smallest is 0."""


def check_seed(seed: object) -> None:
    """Raise a ConfigError unless a seed is an integer from 0 to ``MOST_SEED``."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"seed must be an integer from 0 to {MOST_SEED}, got {shown(seed)}")
