"""What q-cuda says of itself; the entry point of the group ``q.backends``.

Nothing here imports a driver until the probe is called.
"""

from __future__ import annotations

from q_core.backend import Availability, Backend


def probe() -> Availability:
    """Tell whether this process can use an NVIDIA GPU: the devices by name, or why there are none."""
    import torch

    from q_triton import platform_mismatch

    if (mismatch := platform_mismatch("cuda")) is not None:
        return Availability(False, mismatch)
    if not torch.cuda.is_available():
        return Availability(
            False, f"no CUDA device is visible to this torch ({torch.__version__}); check the driver and CUDA_VISIBLE_DEVICES"
        )
    return Availability(True, "; ".join(_describe(index) for index in range(torch.cuda.device_count())))


def _describe(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


backend = Backend(
    name="q_cuda",
    device_types=("cuda",),
    surface_version=1,
    priority=100,
    probe=probe,
    summary="NVIDIA GPUs (CUDA); no ops yet",
)
