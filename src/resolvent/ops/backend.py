"""Former name of ``resolvent.ops.dispatch``."""

from .dispatch import BACKENDS, calls

__all__ = ["BACKENDS", "calls"]
