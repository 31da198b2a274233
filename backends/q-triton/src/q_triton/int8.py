"""Matrix products with int8 weights. Contracts: :mod:`q_core.ops.gemm`.

A product with too few tiles to fill a GPU is divided along K; a second kernel then adds the partial sums, in their order, so that the
same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import impl
from q_triton.kernels.int8_product import few_tokens_kernel, int8_product_kernel
from q_triton.kernels.scaled import add_partials_kernel
from q_triton.launch import launch
from q_triton.shapes import ceil_div, rows_of
from q_triton.tiles import Tiles, tile

INT8_GEMM = Tiles(
    "int8_gemm",
    (
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, warps=4, stages=3, up_to=64),
        tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP_T=8, warps=8, stages=3),
    ),
    size="tokens",
)
GEMM_INT8_WEIGHT = Tiles(
    "gemm_int8_weight",
    (
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, warps=4, stages=3, up_to=64),
        tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, warps=8, stages=3),
    ),
    size="tokens",
)
GEMM_INT8_WEIGHT_FLOAT32 = Tiles(
    "gemm_int8_weight_float32",
    (
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=16, GROUP_T=8, warps=8, stages=2, up_to=64),
        tile(BLOCK_T=128, BLOCK_N=64, BLOCK_K=16, GROUP_T=8, warps=8, stages=2),
    ),
    size="tokens",
)

FEW_TOKENS = 16
"""Rows of a matrix instruction: up to here a product takes as long as it takes to read the weight."""

INT8_GEMM_FEW = Tiles(
    "int8_gemm_few",
    (
        tile(BLOCK_T=16, BLOCK_N=16, BLOCK_K=128, SLICES=4, warps=4, stages=4, up_to=4),
        tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, SLICES=4, warps=4, stages=3),
    ),
    size="tokens",
)
GEMM_INT8_WEIGHT_FEW = Tiles(
    "gemm_int8_weight_few",
    (
        tile(BLOCK_T=16, BLOCK_N=16, BLOCK_K=64, SLICES=4, warps=4, stages=4, up_to=4),
        tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=64, SLICES=4, warps=4, stages=3),
    ),
    size="tokens",
)
GEMM_INT8_WEIGHT_FLOAT32_FEW = Tiles(
    "gemm_int8_weight_float32_few", (tile(BLOCK_T=16, BLOCK_N=16, BLOCK_K=16, SLICES=8, warps=4, stages=4),)
)

INT8_PARTIALS = Tiles("int8_partials", (tile(BLOCK_T=1, BLOCK_N=512, warps=4),))

PROGRAMS = 192
"""About the compute units of a large GPU: a product with fewer tiles is divided along K."""

STEPS = 4
"""Fewest steps along K that are worth a program of their own."""


@impl
def int8_gemm(a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply int8 rows with int8 rows, scales and bias fused."""
    return _product(INT8_GEMM_FEW, INT8_GEMM, a_TK, b_NK, a_scale, b_scale, bias, dtype)


@impl
def gemm_int8_weight(x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply activations with an int8 weight that has one scale a row."""
    few, many = (
        (GEMM_INT8_WEIGHT_FLOAT32_FEW, GEMM_INT8_WEIGHT_FLOAT32)
        if x_TK.dtype == torch.float32
        else (GEMM_INT8_WEIGHT_FEW, GEMM_INT8_WEIGHT)
    )
    return _product(few, many, x_TK, w_NK, None, w_scale, bias, x_TK.dtype)


def _product(
    few: Tiles,
    many: Tiles,
    a_TK: Tensor,
    b_NK: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product of codes, or of floating-point rows if they have no scale, with codes; tiles for few tokens and for more."""
    N = b_NK.shape[0]
    out = torch.empty((*a_TK.shape[:-1], N), dtype=dtype, device=a_TK.device)
    a, b = _aligned(a_TK), _aligned(b_NK)
    T, K = a.shape
    kernel, tiles = (few_tokens_kernel, few) if T <= FEW_TOKENS else (int8_product_kernel, many)
    chosen = tiles.on(a.device, T)
    blocks = chosen.blocks
    programs = ceil_div(T, blocks["BLOCK_T"]) * ceil_div(N, blocks["BLOCK_N"])
    step = blocks["BLOCK_K"] * blocks.get("SLICES", 1)
    splits, span = _splits(programs, K, step)
    sums = out
    if splits > 1:
        sums = torch.empty((splits, T, N), dtype=torch.float32 if a_scale is None else torch.int32, device=a.device)
    finish: dict[str, Any] = {
        "a_scale": None if a_scale is None else a_scale.contiguous(),
        "b_scale": b_scale.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
    }
    launch(
        kernel, (programs, splits), chosen, a=a, b=b, **finish, out=sums, T=T, N=N, K=K,
        a_stride=a.stride(0), b_stride=b.stride(0), span=span, SPLIT=splits > 1, EVEN_K=K % step == 0,
    )  # fmt: skip
    if splits > 1:
        adding = INT8_PARTIALS.on(a.device)
        grid = (ceil_div(T, adding.blocks["BLOCK_T"]), ceil_div(N, adding.blocks["BLOCK_N"]))
        launch(add_partials_kernel, grid, adding, partials=sums, **finish, out=out, T=T, N=N, S=splits)
    return out


def _aligned(x: Tensor) -> Tensor:
    """Rows that begin at a multiple of 16 elements and are as long: read 16 at a time. Others are copied, and padded with zeros."""
    rows = rows_of(x)
    if rows.shape[1] % 16 or rows.stride(0) % 16 or rows.data_ptr() % 16:
        rows = F.pad(rows, (0, -rows.shape[1] % 16))
    return rows


def _splits(programs: int, K: int, step: int) -> tuple[int, int]:
    """How many programs share a tile's sum, and how many features each of them takes."""
    steps = max(1, ceil_div(K, step))
    wanted = max(1, min(PROGRAMS // max(1, programs), steps // STEPS))
    each = ceil_div(steps, wanted)
    return ceil_div(steps, each), each * step
