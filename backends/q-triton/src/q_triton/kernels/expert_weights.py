"""Tiles of an expert's weight in the type that a dot multiplies. N rows, K elements each."""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_e4m3, from_int8, narrowed
from q_triton.kernels.four_bit_weights import decode_4bit_tile


@triton.jit
def expert_weight_tile(
    weight, scale, book, row_stride, rows, in_rows, start, K,
    FORMAT: tl.constexpr, BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Columns ``start``… of some rows, [BLOCK_N, BLOCK_K]; 0 past the last row or column.

    Args:
        weight: the expert's.
        scale: its blocks' absmax (4-bit types); the scale of int8 and fp8 rows is left to what follows the dot.
        book: the values of a 4-bit type by code.
        row_stride: elements from a row to the next; 4-bit rows lie flat.
        rows: int64 [BLOCK_N, 1].
        in_rows: which of them exist, [BLOCK_N, 1].
        start: a multiple of BLOCK_K.
        K: elements of a row.
        FORMAT: "dense", "int8", "fp8" or "4bit".
        BLOCKSIZE: elements that share a scale of a 4-bit type.
        ALIGNED: whether the rows of a 4-bit type are, see ``four_bit_weights``.
        EVEN_K: K is a multiple of BLOCK_K.
        BLOCK_K: 32 at least.
        dtype: of the tile.
    """
    if FORMAT == "4bit":
        return decode_4bit_tile(weight, scale, book, rows, in_rows, start, K, BLOCKSIZE, BLOCK_K, ALIGNED).to(dtype)
    else:
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        mask = in_rows if EVEN_K else in_rows & (columns < K)
        at = weight + rows * row_stride + columns
        if FORMAT == "dense":
            return tl.load(at, mask, 0.0)
        elif FORMAT == "int8":
            return narrowed(from_int8(tl.load(at, mask, 0)), dtype)
        else:
            return narrowed(from_e4m3(tl.load(at, mask, 0)), dtype)
