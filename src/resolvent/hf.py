"""Register the models with Transformers, by ``import resolvent.hf``."""

try:
    from .models.hf import (
        Phase1ForCausalLM,
        Phase1HFConfig,
        Phase2ForCausalLM,
        Phase2HFConfig,
        RecurrentCache,
        predicted_labels,
    )
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "transformers":
        raise
    raise ModuleNotFoundError(
        "resolvent.hf needs Transformers: pip install 'resolvent[hf]'", name=error.name
    ) from error

__all__ = [
    "Phase1ForCausalLM",
    "Phase1HFConfig",
    "Phase2ForCausalLM",
    "Phase2HFConfig",
    "RecurrentCache",
    "predicted_labels",
]
