"""A running average."""

from dataclasses import dataclass


@dataclass
class Average:
    """Exponential average, corrected for its start at zero."""

    decay: float = 0.95
    total: float = 0.0
    weight: float = 0.0

    def update(self, value: float) -> float:
        """Add a value and return the average."""
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight
