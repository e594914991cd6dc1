"""The models, their configurations and their storage."""

from .storage import load_model, save_model

__all__ = ["load_model", "save_model"]
