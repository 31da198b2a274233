"""The 4-bit product: each byte looks up the two weights that it stands for, and float64 sums them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from acme_q.arrays import decline_dtype, float_array, tensor_of
from acme_q.served import counted
from q_core.backend import impl
from q_core.formats.codebooks import FOUR_BIT_BOOKS

QUANT_TYPES = ("nf4", "fp4")


@functools.cache
def pairs(quant_type: str) -> np.ndarray:
    """What each byte stands for, float32 [256, 2]: the value of its high nibble, then of its low one."""
    book = np.array(FOUR_BIT_BOOKS[quant_type].values, np.float32)
    byte = np.arange(256)
    return book[np.stack((byte >> 4, byte & 15), axis=1)]


def _accepts(x_TK: Tensor, quant_type: str) -> str | None:
    if quant_type not in QUANT_TYPES:
        return f"quant_type {quant_type!r}, only {' and '.join(QUANT_TYPES)}"
    return decline_dtype("x_TK", x_TK.dtype)


@impl(accepts=_accepts)
@counted
def gemm_4bit(
    x_TK: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    """Multiply activations with a 4-bit weight."""
    N, K = shape
    values = pairs(quant_type)[packed.contiguous().numpy().reshape(-1)].reshape(-1)[: N * K]
    scales = np.repeat(float_array(absmax).reshape(-1), blocksize)[: N * K]
    weight_NK = (values * scales).reshape(N, K)

    x = float_array(x_TK).reshape(-1, K) if K else np.zeros((x_TK.shape[:-1].numel(), 0), np.float32)
    with np.errstate(all="ignore"):  # NaN and infinity are values like others here
        out = x.astype(np.float64) @ weight_NK.astype(np.float64).T
    if bias is not None:
        out += float_array(bias)
    return tensor_of(out, x_TK.dtype).reshape(*x_TK.shape[:-1], N)
