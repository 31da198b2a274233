"""The trust ratios of LAMB and LARS: norms over whole tensors, without an atomic sum, so that they are the same in every run.

Each program of a first pass over the tensors adds up the squares of its elements; one program a tensor adds up what those found, in
their order. Squares are taken of shares of a power of two near the largest element, so that none overflows or vanishes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits, magnitude_bits
from q_triton.kernels.multi_tensor import entry


@triton.jit
def power_near(largest):
    """The power of two at or below a magnitude, given and returned as a float32's bits; within the normal numbers, as its inverse is."""
    return tl.minimum(tl.maximum(largest & 0x7F800000, 0x00800000), 0x7E800000)


@triton.jit
def inverse(power):
    """One over a power of two of :func:`power_near`, as a float32."""
    return from_bits(0x7F000000 - power)


@triton.jit
def store_squares(sums, x, part, program, programs):
    """Store what norm x contributes: a power of two, and the sum of the squares of its shares of that."""
    power = power_near(tl.max(magnitude_bits(x)))
    share = x * inverse(power)
    tl.store(sums + 2 * part * programs + program, from_bits(power))
    tl.store(sums + (2 * part + 1) * programs + program, tl.sum(share * share))


@triton.jit
def store_norm_terms(sums, a, b, g, program):
    """Store a program's part, rows of sums [5, programs]: squares of a and b, the largest magnitude in g."""
    programs = tl.num_programs(0)
    store_squares(sums, a, 0, program, programs)
    store_squares(sums, b, 1, program, programs)
    tl.store(sums + 4 * programs + program, from_bits(tl.max(magnitude_bits(g))))


@triton.jit
def norm(sums, part, first, count, programs, BLOCK: tl.constexpr):
    """The square root of all squares of a part, whose powers of two differ."""
    offsets = tl.arange(0, BLOCK)
    powers = sums + 2 * part * programs + first
    squares = powers + programs
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        here = start + offsets
        most = tl.maximum(most, tl.load(powers + here, here < count, 0.0).to(tl.int32, bitcast=True))
    power = power_near(tl.max(most, 0))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        here = start + offsets
        share = tl.load(powers + here, here < count, 0.0) * inverse(power)
        total += tl.load(squares + here, here < count, 0.0) * share * share
    return from_bits(power) * tl.sqrt_rn(tl.sum(total, 0))


@triton.jit
def ratio(numerator, denominator):
    """1 where a norm is zero."""
    return tl.where((numerator > 0.0) & (denominator > 0.0), tl.div_rn(numerator, denominator), 1.0)


@triton.jit(do_not_specialize=["starts", "ends", "numels", "places", "programs"])
def trust_ratio_kernel(
    sums, ratios, skipped, starts, ends, numels, places, programs, h, RULE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A tensor's trust ratio, and whether the tensor is to be updated (1 or 0), in ratios [tensors, 2]; counts it where not."""
    tensor = tl.program_id(0)
    first = entry(starts, tensor, places)
    count = entry(ends, tensor, places) - first
    a = norm(sums, 0, first, count, programs, BLOCK)
    b = norm(sums, 1, first, count, programs, BLOCK)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        here = start + offsets
        found = tl.load(sums + 4 * programs + first + here, here < count, 0.0)
        largest = tl.maximum(largest, magnitude_bits(found))
    largest = tl.max(largest, 0)
    trust = ratio(a, b)
    if RULE == "lars":
        trust = tl.where(b > 0.0, ratio(h.trust_coefficient * a, b + h.weight_decay * a + h.eps), 1.0)
    tl.store(ratios + 2 * tensor, trust)
    tl.store(ratios + 2 * tensor + 1, (largest < 0x7F800000).to(tl.float32))
    if skipped is not None:
        # Tensors may share a counter.
        numel = entry(numels, tensor, places).to(tl.int64)
        tl.atomic_add(entry(skipped, tensor, places), numel, largest >= 0x7F800000, sem="relaxed")
