"""Rows in int8, one scale a row. T rows, K elements each."""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits, from_int8, magnitude_bits, to_int8
from q_triton.kernels.scales import stretched


@triton.jit(do_not_specialize=["T"])
def outlier_columns_kernel(x, outliers, T, K, x_stride, threshold, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mark those of BLOCK_K columns that have an outlier in BLOCK_T rows; where programs meet, they write the same."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < T)[:, None] & (columns < K)[None, :]
    value = tl.load(x + rows.to(tl.int64)[:, None] * x_stride + columns[None, :], mask, 0.0).to(tl.float32)
    found = tl.max((mask & (tl.abs(value) >= threshold)).to(tl.int32), 0)
    tl.store(outliers + columns, found.to(tl.uint8), (columns < K) & (found > 0))


@triton.jit(do_not_specialize=["T"])
def quantize_int8_rows_kernel(
    x, codes, absmax, outliers, T, K, x_stride, threshold,
    OUTLIERS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows. A row that fits into BLOCK_K stays in registers; a longer one is read again, from the cache, to be scaled.

    Where ``codes`` isn't of int8, it is given what the codes stand for, and no absmax is stored.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = (rows < T)[:, None]
    at = rows.to(tl.int64)[:, None]
    bits = tl.zeros((BLOCK_T,), tl.int32)
    value = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        value = tl.load(x + at * x_stride + columns, in_rows & (columns < K), 0.0).to(tl.float32)
        magnitude = magnitude_bits(value)
        if OUTLIERS:
            magnitude = tl.where(from_bits(magnitude) >= threshold, 0, magnitude)
        bits = tl.maximum(bits, tl.max(magnitude, 1))
    if absmax is not None:
        tl.store(absmax + rows, from_bits(bits), rows < T)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        mask = in_rows & (columns < K)
        if not WHOLE:
            value = tl.load(x + at * x_stride + columns, mask, 0.0).to(tl.float32)
        code = to_int8(stretched(value, bits, 127.0))
        if OUTLIERS:
            code = tl.where(tl.load(outliers + columns, columns < K, 1) != 0, 0, code).to(tl.int8)
        if codes.dtype.element_ty != tl.int8:
            code = (from_int8(code) * tl.div_rn(from_bits(bits), 127.0)[:, None]).to(codes.dtype.element_ty)
        tl.store(codes + at * K + columns, code, mask)
