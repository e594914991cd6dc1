"""Small models with large weights: no effect is lost in rounding."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from resolvent import Phase1State, Phase2State, create_phase1_model, create_phase2_model
from resolvent.models import IntegratedModel
from resolvent.models.state import ModelState


@dataclass(frozen=True, eq=False)
class SmallPhase:
    """A phase at a size for tests.

    Attributes:
        create: factory of the phase.
        sizes: arguments of the factory.
        spread: standard deviation of the noise that is added to every weight.
        state: type of the states.
    """

    create: Callable[..., Any]
    sizes: dict[str, Any]
    spread: float
    state: type[ModelState]

    def model(self, spread: float | None = None, **options: Any) -> IntegratedModel:
        """Return a model in evaluation mode; ``spread`` and options replace those of the phase."""
        model = self.create(**{**self.sizes, **options})
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * (self.spread if spread is None else spread))
        return model.eval()


SIZES = dict(vocab_size=97, d_model=48, n_layers=3, n_seq=64, num_heads=3, dropout=0.0, device="cpu")
PHASE1 = SmallPhase(create_phase1_model, {**SIZES, "ar_ssm_max_rank": 8, "htt_rank": 6}, 0.15, Phase1State)
PHASE2 = SmallPhase(create_phase2_model, {**SIZES, "head_dim": 16, "consolidation_interval": 64}, 0.3, Phase2State)
HYBRID = replace(PHASE2, sizes={**PHASE2.sizes, "attention_layers": (1,), "attention_window": 24})
"""One of three blocks attends to the last 24 tokens."""
ATTENTION = replace(PHASE2, sizes={**PHASE2.sizes, "attention_layers": (0, 1, 2), "attention_window": 24})
"""All blocks attend to the last 24 tokens."""
FULL = replace(PHASE2, sizes={**PHASE2.sizes, "attention_layers": (1,), "attention_window": None})
"""One of three blocks attends to all tokens, with a state that grows."""


def tokens(length: int = 100, batch: int = 2) -> torch.Tensor:
    """Return random tokens of the vocabulary of a small model."""
    return torch.randint(0, SIZES["vocab_size"], (batch, length))
