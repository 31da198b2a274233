"""Portable Triton kernels for the q backends of GPUs: a library, with no plugin of its own.

The ops' host functions are in a module a family (:data:`q_triton.plugins.FAMILIES`), their kernels in :mod:`q_triton.kernels`; how a
kernel's work is cut on a target, in :mod:`q_triton.tiles`. Importing this imports no Triton: a backend first asks whether it can be
(:func:`availability`), and which platform this torch was built for (:func:`platform_mismatch`).
"""

from __future__ import annotations

from q_triton.platforms import Platform, platform_mismatch
from q_triton.runtime import availability

__all__ = ["Platform", "availability", "platform_mismatch"]
