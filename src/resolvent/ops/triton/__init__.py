"""Triton kernels of the operators, forward and backward. Importing this package registers them."""

from . import cross_entropy, hebbian

__all__ = ["cross_entropy", "hebbian"]
