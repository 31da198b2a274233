"""The reference backend: the surface's semantics in plain PyTorch, oracle of the conformance suite and fallback on any device.

It registers through the same path as any vendor's backend. Its functions compute in float32, or in float64 for float64 inputs (which
the public functions refuse: that is for tests, where it is the oracle).
"""

from __future__ import annotations

from q_core.backend import REFERENCE_PRIORITY, SURFACE_VERSION, Availability, Backend

backend = Backend(
    name="reference",
    device_types=None,
    surface_version=SURFACE_VERSION,
    priority=REFERENCE_PRIORITY,
    probe=lambda: Availability(True, "plain PyTorch, on any device"),
    families=tuple(f"q_core.reference.{family}" for family in ("quantize", "gemm", "optim", "attention", "moe", "norm")),
    summary="the surface's semantics in plain PyTorch",
)
