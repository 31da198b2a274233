"""Optimizer steps with states held as codes of a book of 256 entries, in blocks with a scale each.

Parameter and states are decoded, updated and encoded in registers, in one pass over memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits, magnitude_bits
from q_triton.kernels.multi_tensor import entry, place, span
from q_triton.kernels.optim_rules import norm_terms, updated
from q_triton.kernels.scales import absmax_bits, scaled
from q_triton.kernels.search import nearest, nearest_by_table
from q_triton.kernels.trust_ratio import store_norm_terms


@triton.jit
def in_rows_of(x, BLOCKSIZE: tl.constexpr):
    """Flat elements as rows, a block each."""
    return tl.reshape(x, (x.shape[0] // BLOCKSIZE, BLOCKSIZE))


@triton.jit
def of_each(row, BLOCKSIZE: tl.constexpr):
    """What rows have, of each of their elements, flat."""
    return tl.reshape(tl.broadcast_to(row[:, None], (row.shape[0], BLOCKSIZE)), (row.shape[0] * BLOCKSIZE,))


@triton.jit
def decoded(codes, absmax, book, mask, in_rows, BLOCKSIZE: tl.constexpr):
    """A state's elements, zeros where there are none."""
    code = tl.load(codes, mask, 0, eviction_policy="evict_first").to(tl.int32)
    scale = tl.load(absmax, in_rows, 0.0)
    return tl.load(book + code, mask, 0.0) * of_each(scale, BLOCKSIZE)


@triton.jit
def store_encoded(x, codes, absmax, book, table, mask, in_rows, BLOCKSIZE: tl.constexpr):
    """Encode a state's elements with new scales. Without a table, or one of a book that it can't serve, the book is bisected."""
    rows = in_rows_of(x, BLOCKSIZE)
    bits = absmax_bits(rows)
    share = tl.reshape(scaled(rows, bits), x.shape)
    place_bits = 0
    if table is not None:
        place_bits = tl.load(table)
    code = nearest_by_table(share, table, place_bits) if place_bits > 0 else nearest(share, book, 256)
    tl.store(codes, code.to(tl.uint8), mask)
    tl.store(absmax, from_bits(bits), in_rows)


@triton.jit(do_not_specialize=["starts", "units"])
def optimizer_8bit_kernel(
    parameters, grads, codes1, codes2, codes3, absmax1, absmax2, absmax3, skipped, book1, table1, book2, table2,
    sums, ratios, starts, units, h,
    RULE: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr, TINY_EPS: tl.constexpr,
    UNIT: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks of one tensor, BLOCK elements. With ``sums`` nothing is updated: what the norms are made of is stored there."""
    program = tl.program_id(0)
    tile, first, left = span(program, starts, units, UNIT, BLOCK)
    ratio = 1.0
    if ratios is not None:
        tensor = place(program, starts)
        ratio = tl.load(ratios + 2 * tensor)
        # Of a tensor that is to stay as it is nothing is read or written.
        left = tl.where(tl.load(ratios + 2 * tensor + 1) > 0.0, left, 0)
    row = tl.arange(0, BLOCK // BLOCKSIZE)
    # A thread has 16 bytes of the parameter side by side, and not more: codes come in the same layout, which then nothing has to change.
    VECTOR: tl.constexpr = 128 // parameters[0].dtype.element_ty.primitive_bitwidth
    # All of memory is met flat: of rows Triton 3.6 would lay out the looks into books in another order.
    at = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    mask = at < left
    in_rows = row * BLOCKSIZE < left
    block = tile.to(tl.int64) * (BLOCK // BLOCKSIZE) + row

    param = entry(parameters, program, starts) + first + at
    p = tl.load(param, mask, 0.0).to(tl.float32)
    g = tl.load(entry(grads, program, starts) + first + at, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
    m, v, slow = g, g, g
    if codes1 is not None:
        code1 = entry(codes1, program, starts) + first + at
        scale1 = entry(absmax1, program, starts) + block
        m = decoded(code1, scale1, book1, mask, in_rows, BLOCKSIZE)
    if codes2 is not None:
        code2 = entry(codes2, program, starts) + first + at
        scale2 = entry(absmax2, program, starts) + block
        v = decoded(code2, scale2, book2, mask, in_rows, BLOCKSIZE)
    if codes3 is not None:
        code3 = entry(codes3, program, starts) + first + at
        scale3 = entry(absmax3, program, starts) + block
        slow = decoded(code3, scale3, book1, mask, in_rows, BLOCKSIZE)

    if sums is not None:
        a, b = norm_terms(p, g, m, v, h, RULE, TINY_EPS)
        store_norm_terms(sums, a, b, g, program)
    else:
        if ratios is None:
            is_finite = tl.max(in_rows_of(magnitude_bits(g), BLOCKSIZE), 1) < 0x7F800000
            if skipped is not None:
                counter = entry(skipped, program, starts) + tl.zeros_like(row)
                elements = tl.minimum(left - row * BLOCKSIZE, BLOCKSIZE)
                tl.atomic_add(counter, elements.to(tl.int64), in_rows & ~is_finite, sem="relaxed")
            in_rows = in_rows & is_finite
            # Of what was reshaped the compiler doesn't see that it's the same for whole vectors.
            mask = tl.max_constancy(mask & of_each(is_finite, BLOCKSIZE), UNIT)
        p, m, v, slow = updated(p, g, m, v, slow, ratio, h, RULE, MOMENTUM, NESTEROV, FIRST, TINY_EPS)
        tl.store(param, p.to(parameters[0].dtype.element_ty), mask)
        if codes1 is not None:
            store_encoded(m, code1, scale1, book1, table1, mask, in_rows, BLOCKSIZE)
        if codes2 is not None:
            store_encoded(v, code2, scale2, book2, table2, mask, in_rows, BLOCKSIZE)
        if codes3 is not None:
            store_encoded(slow, code3, scale3, book1, table1, mask, in_rows, BLOCKSIZE)
