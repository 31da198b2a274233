"""Codes of 4 and 8 bits and what they stand for, in portable integer arithmetic: the same bits on every GPU, whatever types it has."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude_bits(x):
    """|x| as an int32 that orders as |x| does, NaN above infinity: an integer maximum keeps NaN, a GPU's float maximum drops it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def from_bits(bits):
    """The float32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def from_e4m3(codes):
    """float8_e4m3fn bytes (uint8) as float32. Moved to the end of its exponent they are 2^-120 times the value; 0x7F and 0xFF are NaN."""
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000  # the sign, and the other seven bits
    value = from_bits(bits) * 1.329227995784916e36
    return tl.where(tl.abs(value) == 480.0, float("nan"), value)


@triton.jit
def to_e4m3(x):
    """float32 within ±448 as float8_e4m3fn bytes (uint8), rounded to nearest, ties to even. x is finite."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 2^-6 and up: three bits of mantissa are kept, and the exponent's bias falls from 127 to 7.
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) >> 20) - (120 << 3)
    # Below, multiples of 2^-9: adding 2^14 rounds to one, which then is the sum's last bits.
    subnormal = (from_bits(magnitude) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_int8(codes):
    """int8 as float32. In the last bits of 1.5 * 2^23 an integer is as it is: a GPU converts integers at a quarter of the rate of sums."""
    return from_bits(codes.to(tl.int32) + 0x4B400000) - 12582912.0


@triton.jit
def narrowed(value, dtype: tl.constexpr):
    """float32 of at most eight bits in another type, exactly: bfloat16 is its upper half, which not every GPU can round to at once."""
    if dtype == tl.bfloat16:
        return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def to_int8(x):
    """float32 within ±127 as int8, rounded to nearest, ties to even: the last bits of its sum with 1.5 * 2^23, which has no place for a
    fraction.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def nibble(packed, element):
    """The 4-bit codes (int32) of elements, from the bytes (uint8) that hold them: the even ones are the high nibbles."""
    return (packed.to(tl.int32) >> (4 - 4 * (element & 1)).to(tl.int32)) & 0xF


@triton.jit
def nibbles(packed):
    """The 4-bit codes (int32 [..., 2 C]) of bytes (uint8 [..., C]), the high nibble first: a byte is read once for both."""
    wide = packed.to(tl.int32)
    return tl.interleave(wide >> 4, wide & 0xF)
