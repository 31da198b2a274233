"""What kernels are compiled for: a platform and an architecture."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from q_triton.environment import interpreted_target
from q_triton.platforms import Platform


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU architecture.

    Attributes:
        name: as its vendor writes it: ``sm_90``, ``gfx942``; ``xe`` for every Intel GPU.
        platform: whose it is.
    """

    name: str
    platform: Platform

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability, such as 90; 0 elsewhere."""
        return int(self.name.removeprefix("sm_")) if self.platform == "cuda" else 0

    @property
    def has_e4m3(self) -> bool:
        """Whether its instructions convert float8_e4m3fn, elsewhere taken apart by integer ones: NVIDIA's from 8.9 on."""
        return self.capability >= 89


_PATTERNS: dict[Platform, str] = {"cuda": r"sm_\d{2,3}", "rocm": r"gfx[0-9a-f]{3,4}", "xpu": "xe"}


def target_named(name: str) -> Target:
    """The target of this name.

    Raises:
        ValueError: it isn't written as one of NVIDIA's, AMD's or Intel's.
    """
    for platform in get_args(Platform):
        if re.fullmatch(_PATTERNS[platform], name):
            return Target(name, platform)
    raise ValueError(f"target {name!r} is unknown, expected one such as 'sm_90', 'gfx942' or 'xe'.")


_chosen: Target | None = None


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Take every device for one of this target, such as torch's meta device when kernels are compiled ahead of time."""
    global _chosen
    before, _chosen = _chosen, target
    try:
        yield
    finally:
        _chosen = before


def target_of(device: torch.device) -> Target:
    """The target of a tensor's device.

    Raises:
        ValueError: it is no GPU, and ``Q_TRITON_TARGET`` names no target to interpret for.
    """
    return _chosen or _target_of(device)


@functools.cache
def _target_of(device: torch.device) -> Target:
    if (name := interpreted_target()) is not None:
        return target_named(name)
    if device.type == "xpu":
        return Target("xe", "xpu")
    if device.type != "cuda":
        raise ValueError(
            f"q_triton runs no kernel on {device}: set TRITON_INTERPRET=1 and Q_TRITON_TARGET to interpret them there."
        )
    if torch.version.hip is not None:
        return Target(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0], "rocm")
    major, minor = torch.cuda.get_device_capability(device)
    return Target(f"sm_{major}{minor}", "cuda")
