"""Root mean square norms. T rows, K elements each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x, residual, weight, out, total, T, K, x_stride, residual_stride, eps,
    ADD: tl.constexpr, WHOLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows. A row that fits into BLOCK_K stays in registers; a longer one is read again, from the cache, to be scaled."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = (rows < T)[:, None]
    at = rows.to(tl.int64)[:, None]
    squares = tl.zeros((BLOCK_T,), tl.float32)
    value = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        mask = in_rows & (columns < K)
        value = tl.load(x + at * x_stride + columns, mask, 0.0).to(tl.float32)
        if ADD:
            value += tl.load(residual + at * residual_stride + columns, mask, 0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + at * K + columns, rounded, mask)
            value = rounded.to(tl.float32)
        squares += tl.sum(value * value, 1)
    scale = tl.rsqrt(squares / K + eps)[:, None]
    if WHOLE:
        columns = tl.arange(0, BLOCK_K)[None, :]
        w = tl.load(weight + columns, columns < K, 0.0).to(tl.float32)
        tl.store(out + at * K + columns, (value * scale * w).to(out.dtype.element_ty), in_rows & (columns < K))
    else:
        for start in range(0, K, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)[None, :]
            mask = in_rows & (columns < K)
            if ADD:
                value = tl.load(total + at * K + columns, mask, 0.0).to(tl.float32)
            else:
                value = tl.load(x + at * x_stride + columns, mask, 0.0).to(tl.float32)
            w = tl.load(weight + columns, columns < K, 0.0).to(tl.float32)
            tl.store(out + at * K + columns, (value * scale * w).to(out.dtype.element_ty), mask)
