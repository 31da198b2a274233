"""Products with a 4-bit weight whose rows are aligned, as :mod:`q_triton.kernels.four_bit_weights` says.

T tokens, N out features, K in features, S parts of K. To decode a code takes three operations and to move it no more than half a byte, so
that it is the operations that few tokens wait for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.four_bit_weights import decode_4bit_codes, decode_4bit_tile, look_up, look_up_table


@triton.jit(do_not_specialize=["T"])
def gemm_4bit_kernel(
    x, packed, absmax, book, bias, out, T, N, K, x_stride,
    BLOCKSIZE: tl.constexpr, SCALE_AFTER: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens by BLOCK_N features, of one of as many parts of K as the grid's second axis has: the sum stays in registers.

    The weight is the left operand: its rows are many, however few the tokens. ``PARTIAL`` sums are written as float32 [S, T, N] for
    :func:`sum_parts_kernel`, without the bias. With ``SCALE_AFTER``, where a row takes whole blocks and BLOCK_K divides BLOCKSIZE, values
    are multiplied as the book has them, and their sums by the scale: that takes fewer operations where BLOCK_T is below BLOCKSIZE.
    """
    # Programs with the same rows of the weight run together, so that the cache has them for the second.
    token_blocks = tl.cdiv(T, BLOCK_T)
    features = tl.program_id(0) // token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(0) % token_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = features.to(tl.int64)[:, None]
    in_rows = rows < N
    x_rows = x + tokens.to(tl.int64)[:, None] * x_stride
    in_tokens = (tokens < T)[:, None]
    part = tl.program_id(1)
    part_size = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(part * part_size, min(K, (part + 1) * part_size), BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        x_tile = tl.load(x_rows + columns, in_tokens & (columns < K), 0.0)
        if SCALE_AFTER:
            weight = decode_4bit_codes(packed, book, rows, in_rows, start, K, BLOCK_K)
            scales = tl.load(absmax + rows * (K // BLOCKSIZE) + start // BLOCKSIZE, in_rows, 0.0)
            sums += tl.dot(weight.to(x_tile.dtype), x_tile.trans(), input_precision="ieee") * scales
        else:
            weight = decode_4bit_tile(packed, absmax, book, rows, in_rows, start, K, BLOCKSIZE, BLOCK_K, True)
            sums = tl.dot(weight.to(x_tile.dtype), x_tile.trans(), sums, input_precision="ieee")
    at = tokens.to(tl.int64)[:, None] * N + features[None, :]
    mask = in_tokens & (features < N)[None, :]
    result = sums.trans()
    if PARTIAL:
        tl.store(out + part.to(tl.int64) * T * N + at, result, mask)
    else:
        if bias is not None:
            result += tl.load(bias + features, features < N, 0.0).to(tl.float32)[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["row_words"])
def gemv_4bit_kernel(
    x, packed, absmax, book, bias, out, N, K, row_words,
    BLOCKSIZE: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N features of one token, over all of K: no sum leaves its thread before the end. Rows take whole blocks.

    ``row_words`` is K / 8. It isn't specialized, because a compiler that knows rows to be aligned reads four words a thread, and the table
    is looked up with one.
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    lanes = tl.arange(0, WORDS)[None, :]
    block_rows = tl.arange(0, BLOCK_N)[:, None]
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    in_rows = first + block_rows < N
    row_blocks = K // BLOCKSIZE
    words_at = packed.to(tl.pointer_type(tl.int32)) + first * row_words + block_rows.to(tl.int64) * row_words
    scales_at = absmax + first * row_blocks + block_rows.to(tl.int64) * row_blocks
    table = look_up_table(book, BLOCK_N)
    sums = tl.zeros((BLOCK_N, WORDS), tl.float32)
    for start in tl.range(0, row_words, WORDS, num_stages=STAGES):
        columns = start + lanes
        mask = columns < row_words
        words = tl.load(words_at + columns, in_rows & mask, 0)
        scales = tl.load(scales_at + columns * 8 // BLOCKSIZE, in_rows & mask, 0.0)
        of_word = tl.zeros((BLOCK_N, WORDS), tl.float32)
        for element in tl.static_range(8):
            value = tl.load(x + columns * 8 + element, mask, 0.0).to(tl.float32)
            of_word += look_up(words, table, element) * value
        sums += of_word * scales
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    result = tl.sum(sums, 1)
    if bias is not None:
        result += tl.load(bias + features, features < N, 0.0).to(tl.float32)
    tl.store(out + features, result.to(out.dtype.element_ty), features < N)


@triton.jit(do_not_specialize=["T", "S"])
def sum_parts_kernel(parts, bias, out, S, T, N, BLOCK_N: tl.constexpr):
    """BLOCK_N features of a token: the sum of S parts [S, T, N] in order, and the bias."""
    token = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = features < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for part in range(S):
        total += tl.load(parts + (part * T + token) * N + features, mask, 0.0)
    if bias is not None:
        total += tl.load(bias + features, mask, 0.0).to(tl.float32)
    tl.store(out + token * N + features, total.to(out.dtype.element_ty), mask)
