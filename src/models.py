"""The report's import path, ``from src.models.phase2 import ...``, for scripts that run from a checkout's root."""

import sys

from resolvent.models import phase1, phase2

sys.modules[f"{__name__}.phase1"] = phase1
sys.modules[f"{__name__}.phase2"] = phase2
