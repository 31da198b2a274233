"""From sums of products with int8 codes to outputs. T tokens, N out features, S partial sums.

A code of an int8 row counts 127ths of the row's absmax, which is its scale.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled(total_TN, a_scale, b_scale, bias, rows, columns, T, N):
    """A tile of sums as float32 outputs: times the scales of both operands' rows (a's may be None: no codes), plus the bias."""
    value = total_TN.to(tl.float32)
    scale = tl.load(b_scale + columns, columns < N, 0.0)[None, :]
    if a_scale is None:
        value *= scale / 127
    else:
        value *= tl.load(a_scale + rows, rows < T, 0.0)[:, None] * scale * (1 / 16129)
    if bias is not None:
        value += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
    return value


@triton.jit(do_not_specialize=["T", "S"])
def add_partials_kernel(
    partials, a_scale, b_scale, bias, out, T, N, S, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """BLOCK_T rows by BLOCK_N outputs, whose partial sums [S, T, N] are added in their order."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < T)[:, None] & (columns < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_N), partials.dtype.element_ty)
    for s in range(0, S):
        total += tl.load(partials + s * (T.to(tl.int64) * N) + at, mask, 0)
    value = scaled(total, a_scale, b_scale, bias, rows, columns, T, N)
    tl.store(out + at, value.to(out.dtype.element_ty), mask)
