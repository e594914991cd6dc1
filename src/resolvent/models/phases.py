"""The two phases side by side, for commands that serve both."""

from collections.abc import Callable
from typing import NamedTuple

from .base import IntegratedModel
from .phase1 import Phase1Config, Phase1IntegratedModel, create_phase1_model, get_phase1_preset
from .phase1.config import PRESETS as PHASE1_PRESETS
from .phase2 import Phase2Config, Phase2IntegratedModel, create_phase2_model, get_phase2_preset
from .phase2.config import PRESETS as PHASE2_PRESETS


class Phase(NamedTuple):
    """Configuration, model, factory and presets of a phase."""

    config: type[Phase1Config] | type[Phase2Config]
    model: type[IntegratedModel]
    create: Callable[..., IntegratedModel]
    preset: Callable[[str], Phase1Config | Phase2Config]
    presets: tuple[str, ...]


PHASES = {
    1: Phase(Phase1Config, Phase1IntegratedModel, create_phase1_model, get_phase1_preset, tuple(PHASE1_PRESETS)),
    2: Phase(Phase2Config, Phase2IntegratedModel, create_phase2_model, get_phase2_preset, tuple(PHASE2_PRESETS)),
}


def phase_of(model: IntegratedModel) -> int:
    """Return the number of a model's phase."""
    return next(number for number, phase in PHASES.items() if isinstance(model, phase.model))
