"""Products with dense and 4-bit weights. Contracts: :mod:`q_core.ops.gemm`.

A dense weight is left to torch's own product, which is the vendor's library. A 4-bit one is decoded in registers while tokens are few; for
many, it is decoded once into memory (N * K elements of x's dtype, for the time of the call) and multiplied by that library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import impl
from q_core.formats.codebooks import book_tensor
from q_core.layouts import decline_private
from q_triton.kernels.four_bit_weights import decode_4bit_kernel
from q_triton.kernels.gemm_4bit import gemm_4bit_kernel, gemv_4bit_kernel, sum_parts_kernel
from q_triton.launch import launch
from q_triton.quantize import round_rows
from q_triton.shapes import ceil_div, rows_of
from q_triton.tiles import Tile, Tiles, tile

DECODE_FIRST = tile()
"""In the place of a tile: the weight is decoded into memory, and torch multiplies."""

GEMM_4BIT = Tiles(
    "gemm_4bit",
    (
        tile(BLOCK_T=16, BLOCK_N=64, BLOCK_K=64, PROGRAMS=512, warps=4, stages=2, up_to=16),
        tile(BLOCK_T=32, BLOCK_N=64, BLOCK_K=64, PROGRAMS=256, warps=4, stages=2, up_to=32),
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, PROGRAMS=256, warps=4, stages=2, up_to=256),
        DECODE_FIRST,
    ),
    size="tokens",
)
"""PROGRAMS: how many there should be, by parts of K, where features and tokens give fewer."""

GEMM_4BIT_FLOAT32 = Tiles(
    "gemm_4bit_float32",
    (tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=32, PROGRAMS=512, warps=4, up_to=16), DECODE_FIRST),
    size="tokens",
)
"""The same for float32, whose products are no matter of matrix instructions."""

GEMV_4BIT = Tiles("gemv_4bit", (tile(BLOCK_N=16, BLOCK_K=256, PROGRAMS=512, warps=2, stages=4),))
"""PROGRAMS: how many the features must give for one token to be multiplied by this; BLOCK_K has a word for each of 32 lanes."""

DECODE_4BIT = Tiles("decode_4bit", (tile(BLOCK_N=16, BLOCK_K=256, warps=4),))
SUM_PARTS = Tiles("sum_parts", (tile(BLOCK_N=512, warps=4),))


@impl(accepts=decline_private)
def gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    """Multiply with a dense weight, by torch's own product."""
    return F.linear(x_TK, w_NK, bias)


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
    """Multiply with a 4-bit weight.

    Activations as int8 save nothing here: few tokens wait for codes to be decoded, and many are multiplied by a library that has no scales
    of blocks. So rows are rounded to what int8 can hold, as the caller agreed to, and multiplied as any other.
    """
    x = rows_of(x_TK)
    if activations == "int8":
        x = round_rows(x)
    (N, K), (T, _), codes = shape, x.shape, packed.contiguous()
    weight = {
        "packed": codes, "absmax": absmax.contiguous(), "book": book_tensor(quant_type, x.device), "N": N, "K": K,
        "BLOCKSIZE": blocksize,
    }  # fmt: skip
    aligned = K % 32 == 0 and codes.data_ptr() % 16 == 0
    chosen = (GEMM_4BIT_FLOAT32 if x.dtype is torch.float32 else GEMM_4BIT).on(x.device, T)
    bias = None if bias is None else bias.contiguous()
    if not aligned or chosen == DECODE_FIRST:
        product = F.linear(x, _decoded(weight, aligned, x.dtype), bias)
    elif T == 1 and (vector := _vector_tile(weight, x.device)) is not None:
        product = _vector_product(x, weight, bias, vector)
    else:
        product = _product(x, weight, bias, chosen)
    return product.view(*x_TK.shape[:-1], N)


def _decoded(weight: dict[str, Any], aligned: bool, dtype: torch.dtype) -> Tensor:
    """The weight, dense [N, K]."""
    N, K = weight["N"], weight["K"]
    out = torch.empty((N, K), dtype=dtype, device=weight["packed"].device)
    chosen = DECODE_4BIT.on(out.device)
    grid = (ceil_div(N, chosen.blocks["BLOCK_N"]), ceil_div(K, chosen.blocks["BLOCK_K"]))
    launch(decode_4bit_kernel, grid, chosen, **weight, out=out, ALIGNED=aligned)
    return out


def _vector_tile(weight: dict[str, Any], device: torch.device) -> Tile | None:
    """How to multiply with one token without parts, or ``None`` where its features are too few or blocks cross its rows."""
    chosen = GEMV_4BIT.on(device)
    blocks = dict(chosen.blocks)
    wanted = blocks.pop("PROGRAMS")
    if weight["K"] % weight["BLOCKSIZE"] or ceil_div(weight["N"], blocks["BLOCK_N"]) < wanted:
        return None
    return Tile(blocks, chosen.warps, chosen.stages)


def _vector_product(x: Tensor, weight: dict[str, Any], bias: Tensor | None, chosen: Tile) -> Tensor:
    """The product of one token with a weight that is decoded on the way."""
    out = torch.empty((1, weight["N"]), dtype=x.dtype, device=x.device)
    launch(
        gemv_4bit_kernel, (ceil_div(weight["N"], chosen.blocks["BLOCK_N"]),), chosen,
        x=x, **weight, bias=bias, out=out, row_words=weight["K"] // 8, STAGES=chosen.stages,
    )  # fmt: skip
    return out


def _product(x: Tensor, weight: dict[str, Any], bias: Tensor | None, chosen: Tile) -> Tensor:
    """The product of tokens with a weight that is decoded on the way."""
    (T, K), N, blocksize = x.shape, weight["N"], weight["BLOCKSIZE"]
    blocks = dict(chosen.blocks)
    wanted = blocks.pop("PROGRAMS")
    programs = ceil_div(T, blocks["BLOCK_T"]) * ceil_div(N, blocks["BLOCK_N"])
    S = max(1, min(wanted // max(1, programs), K // (2 * blocks["BLOCK_K"])))  # a shorter part isn't worth its sum
    out = torch.empty((T, N), dtype=x.dtype, device=x.device)
    sums = out if S == 1 else torch.empty((S, T, N), dtype=torch.float32, device=x.device)
    # Sums of 32 products wait for each other more than they save.
    scale_after = K % blocksize == 0 and blocksize > max(32, blocks["BLOCK_T"])
    launch(
        gemm_4bit_kernel, (programs, S), Tile(blocks, chosen.warps, chosen.stages),
        x=x, **weight, bias=bias if S == 1 else None, out=sums, T=T, x_stride=x.stride(0),
        SCALE_AFTER=scale_after, PARTIAL=S > 1,
    )  # fmt: skip
    if S > 1:
        summing = SUM_PARTS.on(x.device)
        grid = (T, ceil_div(N, summing.blocks["BLOCK_N"]))
        launch(sum_parts_kernel, grid, summing, parts=sums, bias=bias, out=out, S=S, T=T, N=N)
    return out
