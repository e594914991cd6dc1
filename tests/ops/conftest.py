"""Operators are tested with poisoned memory."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_unwritten_memory():
    """Uninitialised floats come as NaN, so that an unwritten output cannot pass for a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
