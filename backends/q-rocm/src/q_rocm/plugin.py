"""What q-rocm says of itself; the entry point of the group ``q.backends``.

Nothing here imports a driver until the probe is called.
"""

from __future__ import annotations

from q_triton.plugins import gpu_backend


def devices() -> list[str]:
    """The AMD GPUs that torch sees; its builds for ROCm answer under the name of CUDA."""
    import torch

    return [_describe(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _describe(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {properties.gcnArchName}"


backend = gpu_backend(
    "q_rocm",
    platform="rocm",
    device_type="cuda",
    devices=devices,
    advice="check the driver and HIP_VISIBLE_DEVICES",
    tiles="q_rocm.tiles",
    summary="Triton kernels for AMD GPUs (ROCm)",
)
