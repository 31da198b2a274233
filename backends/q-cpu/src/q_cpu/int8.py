"""Matrix products with int8 weights, and of int8 activations with 4-bit ones. Contracts: :mod:`q_core.ops.gemm`.

A bias reaches the kernels as float32: a copy of N numbers is nothing beside the product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from q_core.backend import impl
from q_cpu.runtime import native
from q_cpu.support import decline_dtype


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def _accepts_output(dtype: torch.dtype) -> str | None:
    return decline_dtype("dtype", dtype)


def _accepts_activations(x_TK: Tensor) -> str | None:
    return decline_dtype("x_TK", x_TK.dtype)


@impl(accepts=_accepts_output)
def int8_gemm(a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply int8 rows with int8 rows, scales and bias fused."""
    *leading, K = a_TK.shape
    N = b_NK.shape[0]
    out = torch.empty(*leading, N, dtype=dtype)
    native.int8_gemm(
        a_TK.contiguous(), b_NK.contiguous(), a_scale.contiguous(), b_scale.contiguous(), math.prod(leading), N, K,
        _float32(bias), out,
    )  # fmt: skip
    return out


@impl(accepts=_accepts_activations)
def gemm_int8_weight(x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply activations with an int8 weight that has one scale a row."""
    *leading, K = x_TK.shape
    N = w_NK.shape[0]
    out = torch.empty(*leading, N, dtype=x_TK.dtype)
    native.gemm_int8_weight(
        x_TK.detach().contiguous(), w_NK.contiguous(), w_scale.contiguous(), math.prod(leading), N, K, _float32(bias), out
    )
    return out


def gemm_4bit_with_int8_activations(
    x_TK: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    """``gemm_4bit`` with ``activations="int8"``, for the implementation in :mod:`q_cpu.gemm`."""
    *leading, K = x_TK.shape
    N = shape[0]
    out = torch.empty(*leading, N, dtype=x_TK.dtype)
    native.gemm_4bit_int8(
        x_TK.detach().contiguous(), packed.contiguous(), absmax.contiguous(), blocksize, quant_type, math.prod(leading), N, K,
        _float32(bias), out,
    )  # fmt: skip
    return out
