"""What acme says of itself; the entry point of the group ``q.backends``. Importing it loads no kernel."""

from __future__ import annotations

from q_core.backend import Availability, Backend


def probe() -> Availability:
    """The kernels need numpy and nothing else."""
    try:
        import numpy
    except ImportError as error:
        return Availability(False, str(error))
    return Availability(True, f"numpy {numpy.__version__}")


backend = Backend(
    name="acme",
    device_types=("cpu",),
    surface_version=1,
    priority=200,
    probe=probe,
    families=("acme_q.quantize", "acme_q.gemm", "acme_q.attention"),
    summary="numpy on CPU tensors, by a vendor outside the repository",
)
