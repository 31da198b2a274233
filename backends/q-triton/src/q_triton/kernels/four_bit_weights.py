"""Tiles of a 4-bit weight, decoded in registers. N rows, K elements each.

Codes and scales lie flat: element ``n * K + k`` is a nibble of byte ``(n * K + k) // 2``, the even ones are the high nibbles, and its scale
is ``absmax[(n * K + k) // blocksize]``. Rows may start anywhere in a byte or a block. ALIGNED ones take whole runs of 16 bytes, K being a
multiple of 32 and the codes' address one of 16: they are read as words of eight codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import nibble


@triton.jit
def look_up_table(book, ROWS: tl.constexpr):
    """The book for :func:`look_up`, [ROWS, 32]: all 16 values twice, one a lane."""
    return tl.broadcast_to(tl.load(book + (tl.arange(0, 32) & 15))[None, :], (ROWS, 32))


@triton.jit
def look_up(words, table, ELEMENT: tl.constexpr):
    """The value of one of the eight elements of each word, [ROWS, 32], by a shuffle among the lanes that hold the table.

    The first byte is the lowest one, and its first element the high nibble. A lane is a number of five bits: a code with the lowest bit of
    its neighbour, whatever that is, still finds its value.
    """
    BIT: tl.constexpr = ELEMENT // 2 * 8 + (1 - ELEMENT % 2) * 4
    return tl.gather(table, (words >> BIT) & 31, 1)


@triton.jit
def decode_4bit_codes(packed, book, rows, in_rows, start, K, BLOCK_K: tl.constexpr):
    """The values, not yet scaled, of columns ``start``… of some rows: float32 [BLOCK_N, BLOCK_K]. Rows are ALIGNED.

    Args:
        packed: the codes (uint8).
        book: the 16 values (float32) by code.
        rows: int64 [BLOCK_N, 1].
        in_rows: which of them exist, [BLOCK_N, 1]; others and columns past K have the value of code 0.
        start: a multiple of BLOCK_K.
        K: elements of a row.
        BLOCK_K: such that BLOCK_N * BLOCK_K is 256 at least.
    """
    SHAPE: tl.constexpr = (rows.shape[0] * BLOCK_K // 256, 32)
    row_words = tl.multiple_of(K // 8, 4)
    columns = start // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    mask = in_rows & (columns < row_words)
    loaded = tl.load(packed.to(tl.pointer_type(tl.int32)) + rows * row_words + columns, mask, 0)
    words = tl.reshape(loaded, SHAPE)
    table = look_up_table(book, SHAPE[0])
    # Each join appends an axis, and the last one tells neighbours apart.
    evens = tl.join(
        tl.join(look_up(words, table, 0), look_up(words, table, 4)),
        tl.join(look_up(words, table, 2), look_up(words, table, 6)),
    )
    odds = tl.join(
        tl.join(look_up(words, table, 1), look_up(words, table, 5)),
        tl.join(look_up(words, table, 3), look_up(words, table, 7)),
    )
    return tl.reshape(tl.join(evens, odds), (rows.shape[0], BLOCK_K))


@triton.jit
def decode_4bit_tile(
    packed, absmax, book, rows, in_rows, start, K, BLOCKSIZE: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Columns ``start``… of some rows as float32 [BLOCK_N, BLOCK_K]; 0 past the last row or column.

    Args:
        packed: the codes (uint8).
        absmax: the scales.
        book: the 16 values (float32) by code.
        rows: int64 [BLOCK_N, 1].
        in_rows: which of them exist, [BLOCK_N, 1].
        start: a multiple of BLOCK_K.
        K: elements of a row.
        BLOCKSIZE: elements that share a scale.
        BLOCK_K: 32 at least, and such that BLOCK_N * BLOCK_K is 256 at least.
        ALIGNED: whether rows are; if not, every element looks for its own byte and scale.
    """
    if ALIGNED:
        GROUP: tl.constexpr = BLOCKSIZE if BLOCKSIZE < 32 else 32
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        values = decode_4bit_codes(packed, book, rows, in_rows, start, K, BLOCK_K)
        columns = start + tl.arange(0, GROUPS)[None, :] * GROUP
        scales = tl.load(absmax + (rows * K + columns) // BLOCKSIZE, in_rows & (columns < K), 0.0).to(tl.float32)
        scaled = tl.reshape(values, (rows.shape[0], GROUPS, GROUP)) * scales[:, :, None]
        return tl.reshape(scaled, (rows.shape[0], BLOCK_K))
    else:
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        mask = in_rows & (columns < K)
        elements = rows * K + columns
        codes = nibble(tl.load(packed + (elements >> 1), mask, 0), elements)
        scales = tl.load(absmax + elements // BLOCKSIZE, mask, 0.0).to(tl.float32)
        return tl.load(book + codes) * scales


@triton.jit
def decode_4bit_kernel(
    packed, absmax, book, out, N, K, BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """BLOCK_N rows by BLOCK_K columns of the weight, dense [N, K] in the dtype of ``out``."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    start = tl.program_id(1) * BLOCK_K
    columns = start + tl.arange(0, BLOCK_K)[None, :]
    values = decode_4bit_tile(packed, absmax, book, rows, rows < N, start, K, BLOCKSIZE, BLOCK_K, ALIGNED)
    tl.store(out + rows * K + columns, values.to(out.dtype.element_ty), (rows < N) & (columns < K))
