"""Gated activations. T rows, N outputs each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """``x`` times its sigmoid; 0, not NaN, where x is far below 0 and exp overflows."""
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["T"])
def silu_and_mul_kernel(x, out, T, N, x_stride, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_T rows by BLOCK_N outputs."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = rows.to(tl.int64)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < T)[:, None] & (columns < N)
    gate = tl.load(x + at * x_stride + columns, mask, 0.0).to(tl.float32)
    up = tl.load(x + at * x_stride + N + columns, mask, 0.0).to(tl.float32)
    tl.store(out + at * N + columns, (silu(gate) * up).to(out.dtype.element_ty), mask)
