"""Reference of the gemm family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import impl
from q_core.reference.quantize import dequantize_4bit
from q_core.reference.widen import widen


def _product(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None) -> Tensor:
    """Summed and biased wide, rounded once to x's dtype."""
    wide = widen(x_TK)
    return F.linear(wide, w_NK.to(wide.dtype), None if bias is None else bias.to(wide.dtype)).to(x_TK.dtype)


def decode_weight(arguments: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The weight of a ``gemm_4bit`` call, [N, K]."""
    packed, absmax, blocksize, quant_type, shape = (
        arguments[name] for name in ("packed", "absmax", "blocksize", "quant_type", "shape")
    )
    return dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)


@impl
def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x_TK, w_NK, bias)  # torch's own sums wide too, and without widening the weight at every call


@impl
def gemm_4bit(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    return _product(x_TK, dequantize_4bit(packed, absmax, blocksize, quant_type, shape, torch.float32), bias)


@impl
def int8_gemm(a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    # Integers up to 2^53 are exact in float64, which every device multiplies; not every one has an integer product.
    total = F.linear(a_TK.double(), b_NK.double()).float()
    result = total * (a_scale.unsqueeze(-1) * b_scale * (1 / 127**2))
    return (result if bias is None else result + bias.float()).to(dtype)


@impl
def gemm_int8_weight(x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    wide = widen(x_TK)
    product = F.linear(wide, w_NK.to(wide.dtype)) * (w_scale.to(wide.dtype) / 127)
    return (product if bias is None else product + bias.to(wide.dtype)).to(x_TK.dtype)
