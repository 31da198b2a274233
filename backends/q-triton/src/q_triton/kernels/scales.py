"""Scales of blocks, and what is scaled by them, with every rounding of the reference.

A block's absmax is handled as its bits, which are ordered as it is, NaN and infinity above all numbers. Nothing here flushes subnormal
numbers: neither Triton's float32 product nor ``tl.div_rn`` does, on any target. So a product with a subnormal reciprocal, of an absmax
above 2^126, is the reference's too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits, from_e4m3, magnitude_bits, to_e4m3

SMALLEST_NORMAL: tl.constexpr = tl.constexpr(0x00800000)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def absmax_bits(x):
    """Bits of the largest magnitude of each row; of a NaN where there is one."""
    return tl.max(magnitude_bits(x), 1)


@triton.jit
def scaled(x, bits):
    """Rows of x over their scales of these bits: from -1 to 1, or a rounding or (of a 4-bit type) less than 1 beyond; 0 where a scale is
    zero or not finite.

    One product an element. Where a scale is subnormal, its reciprocal may overflow and the reference divides; that, and what a scale that
    isn't finite makes of a product, is mended in the rare tile that has such a row.
    """
    is_plain = (bits >= SMALLEST_NORMAL) & (bits < INFINITY)
    result = x * tl.where(is_plain, tl.div_rn(1.0, from_bits(tl.where(is_plain, bits, 0x3F800000))), 0.0)[:, None]
    if tl.max(((bits > 0) & ~is_plain).to(tl.int32), 0) > 0:
        is_subnormal = (bits > 0) & (bits < SMALLEST_NORMAL)
        quotient = tl.div_rn(x, from_bits(tl.where(is_subnormal, bits, 0x3F800000))[:, None])
        quotient = tl.minimum(tl.maximum(quotient, -1.0), 1.0)
        result = tl.where(is_plain[:, None], result, tl.where(is_subnormal[:, None], quotient, 0.0))
    return result


@triton.jit
def stretched(x, bits, PEAK: tl.constexpr):
    """Rows of x, their largest magnitudes of these bits, so that those become PEAK, or a rounding more; 0 where one is zero or not finite.

    Times PEAK / absmax, or over absmax and times PEAK where the former overflows: in the rare tile that has such a row, or one that isn't
    finite.
    """
    is_finite = (bits > 0) & (bits < INFINITY)
    absmax = from_bits(tl.where(is_finite, bits, 0x3F800000))
    factor = tl.div_rn(PEAK, absmax)
    is_plain = is_finite & (magnitude_bits(factor) < INFINITY)
    result = x * tl.where(is_plain, factor, 0.0)[:, None]
    if tl.max(((bits > 0) & ~is_plain).to(tl.int32), 0) > 0:
        quotient = tl.div_rn(x, absmax[:, None]) * PEAK
        result = tl.where(is_plain[:, None], result, tl.where(is_finite[:, None], quotient, 0.0))
    return result


@triton.jit
def power_of_two_scale(bits):
    """Bits of 6 * 2^e, with the smallest e in -127…125 for which that is not below the absmax; zero and what isn't finite stay.

    6 * 2^e is 1.5 * 2^(e + 2): the absmax's own exponent if its mantissa is at most 1.5, else the next.
    """
    exponent = tl.minimum(tl.maximum((bits + 0x3FFFFF) >> 23, 2), 254)
    return tl.where((bits > 0) & (bits < INFINITY), (exponent << 23) | 0x400000, bits)


@triton.jit
def e4m3_scale(bits, largest):
    """Bits of 6 * t * d, with t = largest / 2688 and d = absmax / (6 t) rounded to E4M3, at least its smallest; the rest as above."""
    is_scaled = (bits > 0) & (bits < INFINITY)
    tensor_scale = tl.div_rn(largest, 2688.0)
    ratio = tl.div_rn(from_bits(tl.where(is_scaled, bits, 0)), tl.where(tensor_scale > 0, 6.0 * tensor_scale, 1.0))
    block_scale = from_e4m3(to_e4m3(tl.minimum(tl.maximum(ratio, 0.001953125), 448.0)))
    return tl.where(is_scaled, magnitude_bits(6.0 * (tensor_scale * block_scale)), bits)
