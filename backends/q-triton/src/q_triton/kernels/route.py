"""Choosing the experts of tokens. T tokens, E experts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def descending_key(x, index):
    """An int64 that is larger for what comes first in a stable descending sort: NaN, then by value, of equal ones the lower index."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals 0
    ordered = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def precise_exp(x):
    """exp(x) within a few roundings however large |x| is, where the exponential of a rounded x * log2(e) is off by as much as that rounding.

    2^n times the exponential of what is left, at most 0.35. n * 355 / 512 is exact, so only its small difference from n * log(2) is rounded.
    """
    x = tl.where(x < -105.0, -105.0, tl.where(x > 90.0, 90.0, x))  # beyond, it is 0 or infinite as there; NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.1219444005469058e-4
    return tl.exp2(n) * tl.exp2(rest * 1.4426950408889634)


@triton.jit(do_not_specialize=["T"])
def route_topk_kernel(
    logits, weights, ids, T, E, logits_stride, k,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows, which stay in registers: of each the largest key is taken k times, and its place noted; then scores are stored there."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = rows.to(tl.int64)[:, None]
    experts = tl.arange(0, BLOCK_E)[None, :]
    mask = (rows < T)[:, None] & (experts < E)
    x = tl.load(logits + at * logits_stride + experts, mask, float("-inf")).to(tl.float32)
    taken = -0x7FFFFFFFFFFFFFFF
    keys = tl.where(mask, descending_key(x, experts), taken)
    place = tl.full((BLOCK_T, BLOCK_E), -1, tl.int32)
    for j in range(k):
        best = keys == tl.max(keys, 1)[:, None]
        place = tl.where(best, j, place)
        keys = tl.where(best, taken, keys)
    chosen = mask & (place >= 0)
    if SIGMOID:
        score = tl.div_rn(1.0, 1.0 + precise_exp(-x))
        total = tl.full((BLOCK_T,), 1.0, tl.float32)
    else:
        score = tl.where(mask, precise_exp(x - tl.max(x, 1)[:, None]), 0.0)
        total = tl.sum(score, 1)
    if RENORMALIZE:
        total = tl.sum(tl.where(chosen, score, 0.0), 1)
    has_nan = tl.max((mask & (x != x)).to(tl.int32), 1) > 0
    total = tl.where(has_nan, float("nan"), total)
    out = at * k + place
    tl.store(weights + out, tl.div_rn(score, tl.broadcast_to(total[:, None], (BLOCK_T, BLOCK_E))), chosen)
    tl.store(ids + out, tl.broadcast_to(experts, (BLOCK_T, BLOCK_E)), chosen)
