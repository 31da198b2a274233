"""The dtype to compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """To float32, except that float64 stays."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
