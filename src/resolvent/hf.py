"""Register the models with Transformers, by ``import resolvent.hf``."""

from .models.hf import (
    Phase1ForCausalLM,
    Phase1HFConfig,
    Phase2ForCausalLM,
    Phase2HFConfig,
    RecurrentCache,
    predicted_labels,
)

__all__ = [
    "Phase1ForCausalLM",
    "Phase1HFConfig",
    "Phase2ForCausalLM",
    "Phase2HFConfig",
    "RecurrentCache",
    "predicted_labels",
]
