"""Flat blocks in 8 bits and back. A program has BLOCK elements: whole blocks of SIZE, a row of the tile each."""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits
from q_triton.kernels.scales import absmax_bits, scaled
from q_triton.kernels.search import nearest, nearest_by_table


@triton.jit
def quantize_blockwise_kernel(x, book, table, codes, absmax, numel, entries, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile is read once and stays in registers. Without a table, or one of a book that it can't serve, the book is bisected."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = tl.minimum(numel - start, BLOCK).to(tl.int32)
    blocks = tl.arange(0, BLOCK // SIZE)
    element = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = element < rest
    value = tl.load(x + start + element, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
    bits = absmax_bits(value)
    tl.store(absmax + start // SIZE + blocks, from_bits(bits), blocks * SIZE < rest)
    value = scaled(value, bits)
    place_bits = 0
    if table is not None:
        place_bits = tl.load(table)
    # Each branch stores its own: a tile that both could have made would stay in registers meanwhile.
    if place_bits > 0:
        tl.store(codes + start + element, nearest_by_table(value, table, place_bits).to(tl.uint8), mask)
    else:
        value = tl.minimum(tl.maximum(value, -1.0), 1.0)
        tl.store(codes + start + element, nearest(value, book, entries).to(tl.uint8), mask)


@triton.jit
def dequantize_blockwise_kernel(codes, absmax, book, out, numel, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The book's lines stay in the first cache."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = tl.minimum(numel - start, BLOCK).to(tl.int32)
    blocks = tl.arange(0, BLOCK // SIZE)
    element = blocks[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = element < rest
    code = tl.load(codes + start + element, mask, 0, eviction_policy="evict_first").to(tl.int32)
    scale = tl.load(absmax + start // SIZE + blocks, blocks * SIZE < rest, 0.0)
    value = tl.load(book + code) * scale[:, None]
    tl.store(out + start + element, value.to(out.dtype.element_ty), mask)
