"""Portable Triton kernels for the q backends of GPUs: a library, with no plugin of its own.

No kernel is in it yet. What it has is what the backends ask before they would run one: whether Triton can be imported here
(:func:`availability`), and which platform this torch was built for (:func:`platform_mismatch`).
"""

from __future__ import annotations

from q_triton.platforms import Platform, platform_mismatch
from q_triton.runtime import availability

__all__ = ["Platform", "availability", "platform_mismatch"]
