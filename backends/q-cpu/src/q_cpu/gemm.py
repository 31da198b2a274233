"""Matrix products with dense and 4-bit weights. Contracts: :mod:`q_core.ops.gemm`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import impl
from q_cpu import int8
from q_cpu.runtime import native
from q_cpu.support import decline_dtype

_OWN_TOKENS: dict[str, dict[torch.dtype, float]] = {
    "avx512": {torch.float32: 256, torch.bfloat16: 32, torch.float16: math.inf},
    "avx2": {torch.float32: 64, torch.bfloat16: 64, torch.float16: math.inf},
    "baseline": {torch.float32: 0, torch.bfloat16: 0, torch.float16: 0},
}
"""Tokens up to which the dense kernel is the faster one, as measured beside torch's product; torch has none for float16 without
instructions of its own for it, and knows other processors better than a baseline kernel can."""


def _accepts_activations(x_TK: Tensor) -> str | None:
    return decline_dtype("x_TK", x_TK.dtype)


@impl(accepts=_accepts_activations)
def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply with a dense weight, by torch's own product where that is faster."""
    *leading, K = x_TK.shape
    T, N = math.prod(leading), w_NK.shape[0]
    if _OWN_TOKENS[native.isa()][x_TK.dtype] < T or not w_NK.is_contiguous():
        return F.linear(x_TK, w_NK, bias)
    out = torch.empty(*leading, N, dtype=x_TK.dtype)
    native.gemm(x_TK.contiguous(), w_NK, T, N, K, None if bias is None else bias.contiguous(), out)
    return out


@impl(accepts=_accepts_activations)
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
    """Multiply activations with a 4-bit weight, whose values are decoded in registers or, for more tokens, into cache."""
    if activations == "int8":
        return int8.gemm_4bit_with_int8_activations(x_TK, packed, absmax, blocksize, quant_type, shape, bias)
    *leading, K = x_TK.shape
    N = shape[0]
    out = torch.empty(*leading, N, dtype=x_TK.dtype)
    native.gemm_4bit(
        x_TK.contiguous(), packed.contiguous(), absmax.contiguous(), blocksize, quant_type, math.prod(leading), N, K,
        None if bias is None else bias.contiguous(), out,
    )  # fmt: skip
    return out
