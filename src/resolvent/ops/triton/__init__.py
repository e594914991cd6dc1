"""Triton kernels of the operators, forward and backward. Importing this package registers them."""

from . import bk_core, cross_entropy, hebbian, queries_keys_values

__all__ = ["bk_core", "cross_entropy", "hebbian", "queries_keys_values"]
