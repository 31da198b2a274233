"""Finding the nearest entry of a code book, exactly as the contract has it: by float32 midpoints, the lower entry on a tie.

The index of the nearest entry of ``x`` is the number of midpoints below it. :func:`nearest` bisects the book itself and needs nothing
prepared; :func:`nearest_by_table` needs one look into a table that :func:`search_table_kernel` makes of a book, for calls with so many
elements that eight looks each would cost more than their memory traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits


@triton.jit
def midpoint(a, b):
    """Half of the rounded sum; never -0."""
    return (a + b) * 0.5 + 0.0


@triton.jit
def nearest(x, book, entries):
    """Index (int32) of the entry nearest to each x, which isn't NaN, in an ascending book of 2 to 256 float32 entries."""
    index = tl.zeros_like(x).to(tl.int32)
    for step in range(8):
        middle = index + (128 >> step)
        is_entry = middle < entries
        bound = midpoint(tl.load(book + middle - 1, is_entry, 0.0), tl.load(book + middle, is_entry, 0.0))
        index = tl.where(is_entry & (bound < x), middle, index)
    return index


@triton.jit
def ordered_bits(x):
    """A float32's bits as an int32 that orders as x does; -0 below +0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_bits(ordered):
    """The float32 of what :func:`ordered_bits` made of it."""
    return from_bits(ordered ^ ((ordered >> 31) & 0x7FFFFFFF))


@triton.jit
def search_table_kernel(book, table, entries, BLOCK: tl.constexpr):
    """BLOCK entries of the table, int32 [2^15], of a book.

    x belongs to a bucket by the highest 15 bits of it (as ordered_bits has them), or 16 where two midpoints would share a bucket; its other
    bits are its place there. A bucket's entry is the number of midpoints below all of it (8 bits), followed by what is to be added to a
    place (24 bits) to carry into that number where x is past the midpoint inside. Entry 0, a bucket far below -1, tells how many bits a
    place has; it is 0 where two midpoints share a bucket still.
    """
    i = tl.arange(0, 256)
    a = tl.load(book + i, i < entries, 0.0)
    b = tl.load(book + i + 1, i + 1 < entries, 0.0)
    c = tl.load(book + i + 2, i + 2 < entries, 0.0)
    differing = ordered_bits(midpoint(a, b)) ^ ordered_bits(midpoint(b, c))
    smallest = tl.min(tl.where(i + 2 < entries, differing & 0x7FFFFFFF, 0x7FFFFFFF), 0)
    place_bits = tl.where(smallest >> 17 > 0, 17, tl.where(smallest >> 16 > 0, 16, 0))

    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bucket = element - 16384
    # What is scaled is within -1 and 1 but for a rounding: the outermost buckets are as those two numbers.
    is_first, is_last = bucket <= (-0x3F800001 >> place_bits), bucket >= (0x3F800000 >> place_bits)
    start = tl.where(is_first, -0x3F800001, tl.where(is_last, 0x3F800000, bucket << place_bits))
    below = nearest(from_ordered_bits(start), book, entries)
    has_next = below + 1 < entries
    lower = tl.load(book + below, has_next, 0.0)
    upper = tl.load(book + below + 1, has_next, 0.0)
    next = ordered_bits(midpoint(lower, upper))
    is_inside = has_next & (next >> place_bits == bucket) & ~is_first & ~is_last
    entry = (below << 24) + tl.where(is_inside, 0xFFFFFF - (next - start), 0)
    tl.store(table + element, tl.where(element == 0, place_bits, entry))


@triton.jit
def nearest_by_table(x, table, place_bits):
    """As :func:`nearest`, for x from -1 to 1; a rounding beyond counts as 1. place_bits is the first entry of the table, not 0."""
    ordered = ordered_bits(x)
    entry = tl.load(table + 16384 + (ordered >> place_bits))
    return ((entry + (ordered & ((1 << place_bits) - 1))) >> 24) & 0xFF


@triton.jit
def encode_4bit(x, table, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes of the entries nearest to x [ROWS, COLUMNS], between -2 and 2, two a byte (uint8 [ROWS, COLUMNS / 2]), the first one high.

    The table is one of :func:`q_triton.four_bit_tables.four_bit_table`. x belongs to one of 64 equal buckets, by the highest bits of x + 6.
    A bucket's entry holds the midpoint inside, the code below it and, a byte further up, the code above it.
    """
    bucket = (x + 6.0).to(tl.uint32, bitcast=True) >> 17
    entry = tl.load(table + bucket - 0x2040)
    codes = (entry >> 32).to(tl.uint32)
    codes = tl.where(x > from_bits(entry.to(tl.int32)), codes >> 8, codes)
    high, low = tl.split(tl.reshape(codes, (ROWS, COLUMNS // 2, 2)))
    # What lies above a nibble, of codes that aren't the nearest, is cut off.
    return ((high << 4) + low).to(tl.uint8)
