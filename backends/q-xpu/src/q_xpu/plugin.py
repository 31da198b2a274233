"""What q-xpu says of itself; the entry point of the group ``q.backends``.

Nothing here imports a driver until the probe is called.
"""

from __future__ import annotations

from q_core.backend import Availability, Backend


def probe() -> Availability:
    """Tell whether this process can use an Intel GPU: the devices by name, or why there are none."""
    import torch

    from q_triton import platform_mismatch

    if (mismatch := platform_mismatch("xpu")) is not None:
        return Availability(False, mismatch)
    if not torch.xpu.is_available():
        return Availability(
            False, f"no XPU device is visible to this torch ({torch.__version__}); check the driver and ZE_AFFINITY_MASK"
        )
    return Availability(True, "; ".join(torch.xpu.get_device_name(index) for index in range(torch.xpu.device_count())))


backend = Backend(
    name="q_xpu",
    device_types=("xpu",),
    surface_version=1,
    priority=100,
    probe=probe,
    summary="Intel GPUs (XPU); no ops yet",
)
