"""Between torch and numpy, and what the families' predicates share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def float_array(tensor: Tensor) -> np.ndarray:
    """Its values as float32, in row-major order; shares the memory where it can, so it is only read."""
    return tensor.detach().to(torch.float32).contiguous().numpy()


def tensor_of(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A new tensor of an array's values, with a contiguous tensor's strides even where it has no elements."""
    return torch.empty(array.shape, dtype=dtype).copy_(torch.from_numpy(array))


def decline_dtype(argument: str, dtype: torch.dtype) -> str | None:
    """Why numpy can't take a dtype, or ``None``."""
    return None if dtype in FLOATS else f"{argument} is {dtype}, only float32, bfloat16 and float16"
