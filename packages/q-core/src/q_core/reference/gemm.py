"""Reference of the gemm family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import impl
from q_core.layouts import decline_private
from q_core.reference.quantize import dequantize_4bit, quantize_int8_rowwise
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


def round_rows(x_TK: Tensor) -> Tensor:
    """Activations as int8 rows hold them, in their own dtype's width or float32."""
    codes, absmax, _ = quantize_int8_rowwise(x_TK, 0.0)
    wide = widen(x_TK)
    return codes.to(wide.dtype) * (absmax.to(wide.dtype).unsqueeze(-1) / 127)


@impl(accepts=decline_private)
def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    return F.linear(x_TK, w_NK, bias)  # torch's own sums wide too, and without widening the weight at every call


@impl(accepts=decline_private)
def gemm_4bit(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
    activations: str,
    layout: str,
) -> Tensor:
    x = round_rows(x_TK) if activations == "int8" else x_TK
    return _product(x, dequantize_4bit(packed, absmax, blocksize, quant_type, shape, torch.float32), bias).to(x_TK.dtype)


@impl(accepts=decline_private)
def int8_gemm(
    a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> Tensor:
    # Integers up to 2^53 are exact in float64, which every device multiplies; not every one has an integer product.
    total = F.linear(a_TK.double(), b_NK.double()).float()
    result = total * (a_scale.unsqueeze(-1) * b_scale * (1 / 127**2))
    return (result if bias is None else result + bias.float()).to(dtype)


@impl(accepts=decline_private)
def gemm_int8_weight(x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    wide = widen(x_TK)
    product = F.linear(wide, w_NK.to(wide.dtype)) * (w_scale.to(wide.dtype) / 127)
    return (product if bias is None else product + bias.to(wide.dtype)).to(x_TK.dtype)


@impl(accepts=decline_private)
def prepack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


@impl(accepts=decline_private)
def unpack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
