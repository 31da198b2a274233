"""Which GPU platform this torch was built for.

torch's builds for CUDA and for ROCm both call their device "cuda", so a backend can't tell by the device whether it is on its own
platform; it asks here, before it asks for a device.
"""

from __future__ import annotations

from typing import Literal, get_args

Platform = Literal["cuda", "rocm", "xpu"]

_TITLES: dict[Platform, str] = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "XPU"}


def _toolkit(platform: Platform) -> str | None:
    """Version of the platform's toolkit that torch was built with, None if it was built without."""
    import torch.version

    match platform:
        case "cuda":
            return torch.version.cuda
        case "rocm":
            return torch.version.hip
        case "xpu":
            return torch.version.xpu


def platform_mismatch(platform: Platform) -> str | None:
    """Say why this torch can't drive a platform, whatever devices there are.

    Args:
        platform: the platform that a backend is for.

    Returns:
        None if this torch was built for the platform, else the reason in words, with the right backend's name where torch was built
        for another platform.
    """
    if _toolkit(platform) is not None:
        return None
    import torch

    for other in get_args(Platform):
        if (toolkit := _toolkit(other)) is not None:
            return f"this torch ({torch.__version__}) is built for {_TITLES[other]} {toolkit}: q-{other} is the backend for it"
    return f"this torch ({torch.__version__}) is built without {_TITLES[platform]}"
