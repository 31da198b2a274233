"""Rotary position embedding. T tokens, H heads, D head dim, P positions, F pairs of components that turn."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def rotary_kernel(
    x, out, positions, cos, sin, T, H, D, F, x_token_stride, x_head_stride,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    source = x + token * x_token_stride + heads.to(tl.int64) * x_head_stride
    target = out + (token * H + heads) * D
    pairs = tl.arange(0, BLOCK_F)[None, :]
    mask = (heads < H) & (pairs < F)
    row = tl.load(positions + token) * F + pairs
    c = tl.load(cos + row, pairs < F, 0.0)
    s = tl.load(sin + row, pairs < F, 0.0)
    first = pairs * 2 if INTERLEAVED else pairs
    second = first + 1 if INTERLEAVED else pairs + F
    a = tl.load(source + first, mask, 0.0).to(tl.float32)
    b = tl.load(source + second, mask, 0.0).to(tl.float32)
    tl.store(target + first, (a * c - b * s).to(out.dtype.element_ty), mask)
    tl.store(target + second, (b * c + a * s).to(out.dtype.element_ty), mask)
    if BLOCK_REST:
        rest = 2 * F + tl.arange(0, BLOCK_REST)[None, :]
        mask = (heads < H) & (rest < D)
        tl.store(target + rest, tl.load(source + rest, mask), mask)
