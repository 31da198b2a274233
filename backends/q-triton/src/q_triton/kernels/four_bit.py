"""Flat blocks in 4 bits and back, two codes a byte. A program has BLOCK elements: whole blocks of SIZE, a row of the tile each."""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits, nibbles
from q_triton.kernels.scales import INFINITY, absmax_bits, e4m3_scale, power_of_two_scale, scaled
from q_triton.kernels.search import encode_4bit


@triton.jit
def largest_absmax_kernel(x, largest, numel, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Bits of the largest finite absmax of this program's blocks: it takes every tile whose number is its own, modulo the programs."""
    blocks = tl.arange(0, BLOCK // SIZE)
    element = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    found = tl.zeros((BLOCK // SIZE,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, tl.num_programs(0).to(tl.int64) * BLOCK):
        rest = tl.minimum(numel - start, BLOCK).to(tl.int32)
        bits = absmax_bits(tl.load(x + start + element, element < rest, 0.0).to(tl.float32))
        found = tl.maximum(found, tl.where(bits < INFINITY, bits, 0))
    tl.store(largest + tl.program_id(0), tl.max(found, 0))


@triton.jit(do_not_specialize=["parts"])
def quantize_4bit_kernel(
    x, table, packed, absmax, largest, numel, size, parts, PARTS: tl.constexpr, RULE: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile is read once and stays in registers; an odd count's last nibble is 0's code."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = tl.minimum(numel - start, BLOCK).to(tl.int32)
    rest_bytes = tl.minimum(size - start // 2, BLOCK // 2).to(tl.int32)
    blocks = tl.arange(0, BLOCK // SIZE)
    element = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(x + start + element, element < rest, 0.0, eviction_policy="evict_first").to(tl.float32)
    bits = absmax_bits(value)
    if RULE == "e8m0":
        bits = power_of_two_scale(bits)
    if RULE == "e4m3":
        bits = e4m3_scale(bits, from_bits(tl.max(tl.load(largest + tl.arange(0, PARTS), tl.arange(0, PARTS) < parts, 0), 0)))
    tl.store(absmax + start // SIZE + blocks, from_bits(bits), blocks * SIZE < rest)
    pairs = encode_4bit(scaled(value, bits), table, BLOCK // SIZE, SIZE)
    byte = blocks[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    tl.store(packed + start // 2 + byte, pairs, byte < rest_bytes)


@triton.jit
def dequantize_4bit_kernel(packed, absmax, book, out, numel, size, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The book is one line of the first cache."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = tl.minimum(numel - start, BLOCK).to(tl.int32)
    rest_bytes = tl.minimum(size - start // 2, BLOCK // 2).to(tl.int32)
    blocks = tl.arange(0, BLOCK // SIZE)
    byte = blocks[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    pairs = tl.load(packed + start // 2 + byte, byte < rest_bytes, 0, eviction_policy="evict_first")
    scale = tl.load(absmax + start // SIZE + blocks, blocks * SIZE < rest, 0.0)
    value = tl.load(book + nibbles(pairs)) * scale[:, None]
    element = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + start + element, value.to(out.dtype.element_ty), element < rest)
