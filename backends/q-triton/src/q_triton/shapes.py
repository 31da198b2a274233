"""Sizes and layouts that host functions share."""

from __future__ import annotations

import math

from torch import Tensor


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that isn't below n, 1 at least: the size of a block that holds n."""
    return 1 << max(0, n - 1).bit_length()


def with_contiguous_last_axis(x: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous, else a copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """[..., K] as [rows, K] with the last axis contiguous: a view where the strides allow one."""
    return with_contiguous_last_axis(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
