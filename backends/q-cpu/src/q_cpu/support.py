"""What the families' capability predicates share: reasons to decline, in words."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))


def decline_dtype(argument: str, dtype: torch.dtype) -> str | None:
    """Why a dtype that must be one of the three floats isn't, or ``None``."""
    return None if dtype in FLOATS else f"{argument} is {dtype}, only float32, bfloat16 and float16"


def decline_in_place(argument: str, tensor: Tensor) -> str | None:
    """Why a tensor can't be updated in place, or ``None``."""
    return None if tensor.is_contiguous() else f"{argument} is not contiguous"


def with_contiguous_last_axis(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its last axis has another stride than 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
