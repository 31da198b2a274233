"""What q-cuda says of itself; the entry point of the group ``q.backends``.

Nothing here imports a driver until the probe is called.
"""

from __future__ import annotations

from q_triton.plugins import gpu_backend


def devices() -> list[str]:
    """The NVIDIA GPUs that torch sees."""
    import torch

    return [_describe(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _describe(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


backend = gpu_backend(
    "q_cuda",
    platform="cuda",
    device_type="cuda",
    devices=devices,
    advice="check the driver and CUDA_VISIBLE_DEVICES",
    tiles="q_cuda.tiles",
    summary="Triton kernels for NVIDIA GPUs (CUDA)",
)
