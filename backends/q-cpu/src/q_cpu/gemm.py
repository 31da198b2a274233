"""Matrix products with quantized weights. Contracts: :mod:`q_core.ops.gemm`.

Activations and bias reach the kernels as float32: a copy of T·K or N numbers is little beside the product, and leaves one kernel an op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from q_core.backend import impl
from q_cpu.runtime import native
from q_cpu.support import decline_4bit_type, decline_dtype


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _accepts_4bit(x_TK: Tensor, quant_type: str) -> str | None:
    return decline_dtype("x_TK", x_TK.dtype) or decline_4bit_type(quant_type)


def _accepts_output(dtype: torch.dtype) -> str | None:
    return decline_dtype("dtype", dtype)


@impl(accepts=_accepts_4bit)
def gemm_4bit(
    x_TK: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    """Multiply activations with a 4-bit weight; the sums of a token don't depend on what else is in the batch."""
    *leading, K = x_TK.shape
    N = shape[0]
    out = torch.empty(*leading, N, dtype=x_TK.dtype)
    native.gemm_4bit(
        _float32(x_TK), packed.contiguous(), absmax.contiguous(), blocksize, quant_type, math.prod(leading), N, K,
        None if bias is None else _float32(bias), out,
    )  # fmt: skip
    return out


@impl(accepts=_accepts_output)
def int8_gemm(a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply int8 rows with int8 rows, scales and bias fused."""
    *leading, K = a_TK.shape
    N = b_NK.shape[0]
    out = torch.empty(*leading, N, dtype=dtype)
    native.int8_gemm(
        a_TK.contiguous(), b_NK.contiguous(), a_scale.contiguous(), b_scale.contiguous(), math.prod(leading), N, K,
        None if bias is None else _float32(bias), out,
    )  # fmt: skip
    return out
