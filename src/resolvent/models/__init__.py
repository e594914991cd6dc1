"""The models, their configurations and their storage."""

from .base import IntegratedModel
from .storage import load_model, save_model

__all__ = ["IntegratedModel", "load_model", "save_model"]
