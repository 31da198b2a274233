"""Inputs that don't fit into the cache together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

WORKING_SET = 192 * 2**20
"""Bytes: six times the last-level cache of the machine that the targets were taken on."""

MOST_SETS = 16


def sets_for(bytes_each: int) -> int:
    """Sets of inputs of a size that fill the working set."""
    return max(1, min(MOST_SETS, -(-WORKING_SET // max(1, bytes_each))))


def repeated(make: Callable[[], Item], count: int) -> list[Item]:
    """Independent sets of inputs."""
    return [make() for _ in range(count)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def short(dtype: torch.dtype) -> str:
    """A dtype's name, for people."""
    return str(dtype).removeprefix("torch.")
