"""The report's import paths, ``from src.models.phase2 import ...``, for scripts that run from a checkout's root."""

import sys

from resolvent.models import phase1, phase2

__all__ = ["phase1", "phase2"]

for _name, _module in list(sys.modules.items()):
    if _name.startswith("resolvent.models."):
        sys.modules[_name.replace("resolvent.models", __name__, 1)] = _module
