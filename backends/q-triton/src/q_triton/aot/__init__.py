"""Compiling kernels for GPUs that aren't there, and reading off the result what it would cost on them."""
