"""What q-xpu says of itself; the entry point of the group ``q.backends``.

Nothing here imports a driver until the probe is called.
"""

from __future__ import annotations

from q_triton.plugins import gpu_backend


def devices() -> list[str]:
    """The Intel GPUs that torch sees."""
    import torch

    return [torch.xpu.get_device_name(index) for index in range(torch.xpu.device_count())] if torch.xpu.is_available() else []


backend = gpu_backend(
    "q_xpu",
    platform="xpu",
    device_type="xpu",
    devices=devices,
    advice="check the driver and ZE_AFFINITY_MASK",
    tiles="q_xpu.tiles",
    summary="Triton kernels for Intel GPUs (XPU)",
)
