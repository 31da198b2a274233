"""Optimizer steps with states held in float32, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import magnitude_bits
from q_triton.kernels.multi_tensor import entry, place, span
from q_triton.kernels.optim_rules import norm_terms, updated
from q_triton.kernels.trust_ratio import store_norm_terms


@triton.jit(do_not_specialize=["starts", "units"])
def optimizer_32bit_kernel(
    parameters, grads, state1, state2, state3, skipped, sums, ratios, starts, units, h,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr, TINY_EPS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one tensor. With ``sums`` nothing is updated: what the norms are made of is stored there."""
    program = tl.program_id(0)
    _, first, left = span(program, starts, units, UNIT, BLOCK)
    ratio = 1.0
    if ratios is not None:
        tensor = place(program, starts)
        ratio = tl.load(ratios + 2 * tensor)
        # Of a tensor that is to stay as it is nothing is read or written.
        left = tl.where(tl.load(ratios + 2 * tensor + 1) > 0.0, left, 0)
    at = tl.arange(0, BLOCK)
    mask = at < left

    param = entry(parameters, program, starts) + first + at
    p = tl.load(param, mask, 0.0).to(tl.float32)
    g = tl.load(entry(grads, program, starts) + first + at, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
    m, v, slow = g, g, g
    if state1 is not None:
        m_at = entry(state1, program, starts) + first + at
        m = tl.load(m_at, mask, 0.0, eviction_policy="evict_first")
    if state2 is not None:
        v_at = entry(state2, program, starts) + first + at
        v = tl.load(v_at, mask, 0.0, eviction_policy="evict_first")
    if state3 is not None:
        slow_at = entry(state3, program, starts) + first + at
        slow = tl.load(slow_at, mask, 0.0, eviction_policy="evict_first")

    if sums is not None:
        a, b = norm_terms(p, g, m, v, h, RULE, TINY_EPS)
        store_norm_terms(sums, a, b, g, program)
    else:
        is_finite = magnitude_bits(g) < 0x7F800000
        if skipped is not None:
            count = tl.sum((~is_finite).to(tl.int32), 0)
            if count > 0:
                tl.atomic_add(entry(skipped, program, starts), count.to(tl.int64), sem="relaxed")
        new_p, new_m, new_v, new_slow = updated(p, g, m, v, slow, ratio, h, RULE, MOMENTUM, NESTEROV, FIRST, TINY_EPS)
        # What is kept is stored as it was: under a mask of its own for each element no vectors could be stored.
        tl.store(param, tl.where(is_finite, new_p, p).to(parameters[0].dtype.element_ty), mask)
        if state1 is not None:
            tl.store(m_at, tl.where(is_finite, new_m, m), mask)
        if state2 is not None:
            tl.store(v_at, tl.where(is_finite, new_v, v), mask)
        if state3 is not None:
            tl.store(slow_at, tl.where(is_finite, new_slow, slow), mask)
