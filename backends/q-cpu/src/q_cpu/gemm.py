"""Matrix products with 4-bit weights. Contracts: :mod:`q_core.ops.gemm`.

Activations and bias reach the kernels as float32: a copy of T·K or N numbers is little beside the product, and leaves one kernel an op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from q_core.backend import impl
from q_cpu import int8
from q_cpu.runtime import native
from q_cpu.support import decline_4bit_type, decline_dtype


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _accepts_4bit(x_TK: Tensor, quant_type: str, activations: str) -> str | None:
    return decline_dtype("x_TK", x_TK.dtype) or (None if activations == "int8" else decline_4bit_type(quant_type))


@impl(accepts=_accepts_4bit)
def gemm_4bit(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
    activations: str,
) -> Tensor:
    """Multiply activations with a 4-bit weight; the sums of a token don't depend on what else is in the batch."""
    if activations == "int8":
        return int8.gemm_4bit(x_TK, packed, absmax, blocksize, quant_type, shape, bias)
    *leading, K = x_TK.shape
    N = shape[0]
    out = torch.empty(*leading, N, dtype=x_TK.dtype)
    native.gemm_4bit(
        _float32(x_TK), packed.contiguous(), absmax.contiguous(), blocksize, quant_type, math.prod(leading), N, K,
        None if bias is None else _float32(bias), out,
    )  # fmt: skip
    return out
