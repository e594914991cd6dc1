"""Phase 1: the static-Hamiltonian model."""

from .config import Phase1Config

__all__ = ["Phase1Config"]
