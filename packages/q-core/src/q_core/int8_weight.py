"""Multiplying with an int8 weight's rows, which is what its gradient to activations takes."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_rows(dy_TN: Tensor, codes_NK: Tensor, absmax: Tensor) -> Tensor:
    """``dy @ (codes * absmax / 127)``, in dy's dtype.

    Args:
        dy_TN: float32, bfloat16 or float16 [..., N].
        codes_NK: int8 [N, K].
        absmax: float32 [N].

    Returns:
        Tensor [..., K] of dy's dtype.
    """
    scales = absmax / 127
    if dy_TN.dtype is torch.float16:  # whose range is too small for a gradient times a scale
        return dy_TN @ (codes_NK.float() * scales.unsqueeze(1)).to(dy_TN.dtype)
    # The codes are exact in any dtype, so that the scales may go to the gradient, which is smaller than the weight.
    return (dy_TN * scales).to(dy_TN.dtype) @ codes_NK.to(dy_TN.dtype)
