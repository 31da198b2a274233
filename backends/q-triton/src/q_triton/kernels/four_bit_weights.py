"""Tiles of a 4-bit weight, decoded in registers. N rows, K elements each.

Codes and scales lie flat: element ``n * K + k`` is a nibble of byte ``(n * K + k) // 2``, the even ones are the high nibbles, and its scale is
``absmax[(n * K + k) // blocksize]``. Rows may start anywhere in a byte or a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import nibble


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
        BLOCK_K: 32 at least.
        ALIGNED: K is a multiple of 32 and codes start at a multiple of 16 bytes, so that a thread reads 16 bytes at once, which at most
            two scales (nvfp4) belong to. Without it, every element looks for its own byte and scale.
    """
    if ALIGNED:
        BLOCK_N: tl.constexpr = rows.shape[0]
        GROUP: tl.constexpr = BLOCKSIZE if BLOCKSIZE < 32 else 32
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        row_bytes = tl.multiple_of(K // 2, 16)
        pairs = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        both = tl.load(packed + rows * row_bytes + pairs, in_rows & (pairs < row_bytes), 0).to(tl.int32)
        values = tl.join(tl.load(book + (both >> 4)), tl.load(book + (both & 0xF)))
        columns = start + tl.arange(0, GROUPS)[None, :] * GROUP
        scales = tl.load(absmax + (rows * K + columns) // BLOCKSIZE, in_rows & (columns < K), 0.0).to(tl.float32)
        return tl.reshape(tl.reshape(values, (BLOCK_N, GROUPS, GROUP)) * scales[:, :, None], (BLOCK_N, BLOCK_K))
    else:
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        mask = in_rows & (columns < K)
        elements = rows * K + columns
        codes = nibble(tl.load(packed + (elements >> 1), mask, 0), elements)
        scales = tl.load(absmax + elements // BLOCKSIZE, mask, 0.0).to(tl.float32)
        return tl.load(book + codes) * scales
