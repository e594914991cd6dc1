"""Triton kernels of the operators, forward and backward. Importing this package registers them."""

from . import hebbian

__all__ = ["hebbian"]
