"""Temporary removal of parts of a Phase 2 model."""

from collections.abc import Iterator
from contextlib import contextmanager

from resolvent.errors import ConfigError
from resolvent.models.phase2 import Phase2IntegratedModel
from resolvent.models.phase2.block import blocks_of


@contextmanager
def switched_off(model: Phase2IntegratedModel, mechanism: str) -> Iterator[None]:
    """Run a model without ``snr_filter`` or ``resonance`` in all blocks, and restore them afterwards.

    Args:
        model: the model.
        mechanism: attribute of the blocks, ``snr_filter`` or ``resonance``.

    Raises:
        ConfigError: no part of that name can be switched off.
    """
    if mechanism not in ("snr_filter", "resonance"):
        raise ConfigError(f"mechanism must be snr_filter or resonance, got {mechanism!r}")
    blocks = blocks_of(model)
    kept = [getattr(block, mechanism) for block in blocks]
    try:
        for block in blocks:
            setattr(block, mechanism, None)
        yield
    finally:
        for block, module in zip(blocks, kept, strict=True):
            setattr(block, mechanism, module)
