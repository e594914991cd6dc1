"""Triton kernels of the operators, forward and backward. The operators import them when they first launch one."""
