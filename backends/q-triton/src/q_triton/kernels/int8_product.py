"""Products of rows of activations with rows of int8 codes. T tokens, N out features, K in features.

Activations are int8 codes too, and the sums exact integers, or floating-point, and the sums float32. The weight is the left operand,
the product transposed: Hopper's matrix instructions take the left one from registers, where codes are decoded, and the right one
from shared memory only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_int8, narrowed
from q_triton.kernels.order import grouped
from q_triton.kernels.scaled import scaled


@triton.jit
def add_product(codes, a, total):
    """A weight's codes times activations, added to the sums so far, which are int32 or float32."""
    if a.dtype == tl.int8:
        total = tl.dot(codes, a, total, out_dtype=tl.int32)
    else:
        total = tl.dot(narrowed(from_int8(codes), a.dtype), a, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["T"])
def int8_product_kernel(
    a, b, a_scale, b_scale, bias, out, T, N, K, a_stride, b_stride, span,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows by BLOCK_N outputs, whose sums stay in registers.

    With SPLIT a program sums ``span`` features only, and ``out`` takes the sums as they are, [splits, T, N].
    """
    row, column = grouped(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N), GROUP_T)
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * span if SPLIT else 0
    last = tl.minimum(first + span, K) if SPLIT else K
    features = tl.arange(0, BLOCK_K)
    a_at = a + rows.to(tl.int64)[None, :] * a_stride + (first + features)[:, None]
    b_at = b + columns.to(tl.int64)[:, None] * b_stride + (first + features)[None, :]
    total_NT = tl.zeros((BLOCK_N, BLOCK_T), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(first, last, BLOCK_K):
        in_a, in_b = (rows < T)[None, :], (columns < N)[:, None]
        if not EVEN_K:
            in_a &= (features < K - start)[:, None]
            in_b &= (features < K - start)[None, :]
        total_NT = add_product(tl.load(b_at, in_b, 0), tl.load(a_at, in_a, 0.0), total_NT)
        a_at += BLOCK_K
        b_at += BLOCK_K
    total_TN = tl.trans(total_NT)
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < T)[:, None] & (columns < N)[None, :]
    if SPLIT:
        tl.store(out + tl.program_id(1) * (T.to(tl.int64) * N) + at, total_TN, mask)
    else:
        value = scaled(total_TN, a_scale, b_scale, bias, rows, columns, T, N)
        tl.store(out + at, value.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def few_tokens_kernel(
    a, b, a_scale, b_scale, bias, out, T, N, K, a_stride, b_stride, span,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows by BLOCK_N outputs, as ``int8_product_kernel``, where one or two such tiles are all the rows.

    A step takes SLICES times BLOCK_K features, and each slice has a sum of its own: a batch of products, which warps divide among
    them. So all warps of a program are at work on no more rows of the weight than one matrix instruction has.
    """
    row, column = grouped(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N), 2)
    rows = row * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * span if SPLIT else 0
    last = tl.minimum(first + span, K) if SPLIT else K
    features = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    a_at = a + rows.to(tl.int64)[None, None, :] * a_stride + (first + features)[:, :, None]
    b_at = b + columns.to(tl.int64)[None, :, None] * b_stride + (first + features)[:, None, :]
    sums = tl.zeros((SLICES, BLOCK_N, BLOCK_T), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(first, last, SLICES * BLOCK_K):
        in_a, in_b = (rows < T)[None, None, :], (columns < N)[None, :, None]
        if not EVEN_K:
            in_a &= (features < K - start)[:, :, None]
            in_b &= (features < K - start)[:, None, :]
        sums = add_product(tl.load(b_at, in_b, 0), tl.load(a_at, in_a, 0.0), sums)
        a_at += SLICES * BLOCK_K
        b_at += SLICES * BLOCK_K
    total_TN = tl.trans(tl.sum(sums, 0))
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < T)[:, None] & (columns < N)[None, :]
    if SPLIT:
        tl.store(out + tl.program_id(1) * (T.to(tl.int64) * N) + at, total_TN, mask)
    else:
        value = scaled(total_TN, a_scale, b_scale, bias, rows, columns, T, N)
        tl.store(out + at, value.to(out.dtype.element_ty), mask)
