"""What q_cpu says of itself; the entry point of the group ``q.backends``.

Cheap to import: torch and the native module come with the probe.
"""

from __future__ import annotations

from q_core.backend import Availability, Backend


def probe() -> Availability:
    """Set the native module up; the reason says which ISA level and threads it works with, or why it can't."""
    try:
        from q_cpu import runtime
    except (ImportError, ValueError) as error:
        return Availability(False, str(error))
    return Availability(True, runtime.description())


backend = Backend(
    name="q_cpu",
    device_types=("cpu",),
    surface_version=1,
    priority=100,
    probe=probe,
    families=("q_cpu.quantize", "q_cpu.gemm", "q_cpu.int8", "q_cpu.optim", "q_cpu.attention", "q_cpu.norm", "q_cpu.moe"),
    summary="native kernels for CPUs (AVX-512, AVX2, any other)",
)
