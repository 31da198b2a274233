"""What q-rocm says of itself; the entry point of the group ``q.backends``.

Nothing here imports a driver until the probe is called.
"""

from __future__ import annotations

from q_core.backend import Availability, Backend


def probe() -> Availability:
    """Tell whether this process can use an AMD GPU: the devices by name, or why there are none."""
    import torch

    from q_triton import platform_mismatch

    if (mismatch := platform_mismatch("rocm")) is not None:
        return Availability(False, mismatch)
    # torch's builds for ROCm answer under the name of CUDA.
    if not torch.cuda.is_available():
        return Availability(
            False, f"no ROCm device is visible to this torch ({torch.__version__}); check the driver and HIP_VISIBLE_DEVICES"
        )
    return Availability(True, "; ".join(_describe(index) for index in range(torch.cuda.device_count())))


def _describe(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {properties.gcnArchName}"


backend = Backend(
    name="q_rocm",
    device_types=("cuda",),
    surface_version=1,
    priority=100,
    probe=probe,
    summary="AMD GPUs (ROCm); no ops yet",
)
