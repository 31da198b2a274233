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

_STREAMED_TOKENS = {torch.float32: 32, torch.bfloat16: 8, torch.float16: 32}
"""Tokens up to which the dense kernel is faster than torch's product, as measured with AVX-512."""


def _accepts_activations(x_TK: Tensor) -> str | None:
    return decline_dtype("x_TK", x_TK.dtype)


@impl(accepts=_accepts_activations)
def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply with a dense weight: a few tokens by a kernel that streams it, more by torch's own product."""
    *leading, K = x_TK.shape
    T, N = math.prod(leading), w_NK.shape[0]
    most = _STREAMED_TOKENS[x_TK.dtype]
    if T > most or not w_NK.is_contiguous():
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
