"""Activations as int8 rows hold them. T rows, K elements each."""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits, magnitude_bits

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 between -2^22 and 2^22 plus this has no bits left behind the point, rounded to nearest, ties to even."""


@triton.jit
def rounded_rows_kernel(x, out, K, x_stride, BLOCK_K: tl.constexpr):
    """A row: each element as the nearest of 255 multiples of the row's largest magnitude over 127. The row is read twice."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        largest = tl.maximum(largest, magnitude_bits(tl.load(x + row * x_stride + columns, columns < K, 0.0).to(tl.float32)))
    absmax = from_bits(tl.max(largest, 0))
    factor = tl.div_rn(127.0, absmax)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + row * x_stride + columns, columns < K, 0.0).to(tl.float32)
        # Over a subnormal maximum, 127 isn't finite.
        scaled = tl.where(factor < float("inf"), value * factor, tl.div_rn(value, absmax) * 127.0)
        codes = tl.where((absmax > 0.0) & (absmax < float("inf")), scaled + ROUND - ROUND, 0.0)
        tl.store(out + row * K + columns, (codes * tl.div_rn(absmax, 127.0)).to(out.dtype.element_ty), columns < K)
