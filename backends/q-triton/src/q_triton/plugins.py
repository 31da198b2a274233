"""What the backends of GPUs have in common: how they find out whether they can work, and which ops they get from here.

A backend adds the names of its devices, its tiles, and modules with ops that it does better; nothing of Triton or a driver is imported
before the probe.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from q_core.backend import SURFACE_VERSION, Availability, Backend
from q_triton.environment import interpreted_target
from q_triton.platforms import Platform, platform_mismatch
from q_triton.runtime import availability

FAMILIES = (
    "q_triton.quantize",
    "q_triton.gemm",
    "q_triton.int8",
    "q_triton.optim",
    "q_triton.attention",
    "q_triton.moe",
    "q_triton.norm",
)
"""Modules with the implementations of the surface's ops."""


def gpu_backend(
    name: str,
    *,
    platform: Platform,
    device_type: str,
    devices: Callable[[], list[str]],
    advice: str,
    tiles: str,
    families: tuple[str, ...] = (),
    summary: str,
) -> Backend:
    """Describe a backend that serves a platform's GPUs with this package's kernels.

    Where ``TRITON_INTERPRET=1`` and ``Q_TRITON_TARGET`` name a target of the platform, it serves the CPU instead, through Triton's
    interpreter and with that target's tiles: the same host functions and kernels, for tests on any machine.

    Args:
        name: the backend's.
        platform: whose GPUs.
        device_type: torch's type of them.
        devices: the GPUs that torch sees, in words; empty if none.
        advice: what to check where there are none.
        tiles: module that registers the backend's tiles when imported.
        families: modules whose ops come in the place of this package's.
        summary: a line for ``q-core doctor``.
    """
    target = interpreted_target()
    on_devices = functools.partial(_probe, platform, devices, advice)
    return Backend(
        name=name,
        device_types=(device_type if target is None else "cpu",),
        surface_version=SURFACE_VERSION,
        priority=100 if target is None else 200,  # before what else serves the CPU: it was asked for by name
        probe=on_devices if target is None else functools.partial(_interpreter, platform, target),
        families=(tiles, *FAMILIES, *families),
        summary=summary,
    )


def _probe(platform: Platform, devices: Callable[[], list[str]], advice: str) -> Availability:
    import torch

    if (mismatch := platform_mismatch(platform)) is not None:
        return Availability(False, mismatch)
    if not (found := devices()):
        title = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "XPU"}[platform]
        return Availability(False, f"no {title} device is visible to this torch ({torch.__version__}); {advice}")
    triton = availability()
    return Availability(triton.available, f"{'; '.join(found)}; {triton.reason}")


def _interpreter(platform: Platform, target: str) -> Availability:
    from q_triton.targets import target_named

    try:
        asked = target_named(target)
    except ValueError as error:
        return Availability(False, f"Q_TRITON_TARGET: {error}")
    if asked.platform != platform:
        return Availability(False, f"Q_TRITON_TARGET is {target}: q-{asked.platform} is the backend for it")
    triton = availability()
    return Availability(triton.available, f"interpreted on the CPU, with the tiles of {target}; {triton.reason}")
