"""The models, their configurations and their storage."""

from .base import IntegratedModel, observe
from .storage import load_model, save_model
from .trace import Trace

__all__ = ["IntegratedModel", "Trace", "load_model", "observe", "save_model"]
