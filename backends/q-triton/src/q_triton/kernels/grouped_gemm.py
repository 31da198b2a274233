"""The products of experts. P pairs of a token and an expert, E experts; of one product N out features and K in features, S parts of K.

The weight is the left operand, which alone may come from registers in Hopper's matrix instructions: a decoded right one would go through
shared memory again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.expert_weights import expert_weight_tile
from q_triton.kernels.gate import silu
from q_triton.kernels.order import grouped
from q_triton.kernels.sort_tokens import sorted_tile, unsorted_tile


@triton.jit(do_not_specialize=["tiles", "P", "part_blocks"])
def grouped_gemm_kernel(
    x, weight, scale, book, out, ids, order, starts, tiles, P, E, N, K, part_blocks,
    pairs_of_row, x_stride, expert_stride, row_stride, scale_stride, scale_factor,
    GATED: tl.constexpr, SORTED: tl.constexpr, FORMAT: tl.constexpr, BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of an expert's weight times up to BLOCK_T pairs that chose it, over a part of K, ``part_blocks`` times BLOCK_K; the sums
    stay in registers.

    A pair's row of ``x`` is ``pair // pairs_of_row``; its row of ``out`` [S, P, N] is the pair's own. With GATED, for which the only part is
    the whole, the weight is gate over up, [2N, K]: a program has the same BLOCK_N / 2 rows of either, alternating, so that a gate and its up
    meet in one thread, and ``out`` takes silu(gate) * up.
    """
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    tile, block = grouped(tl.program_id(0), tiles, tl.cdiv(N, OUTPUTS), GROUP_T)
    if SORTED:
        expert, pairs = sorted_tile(tile, order, starts, E, BLOCK_E, BLOCK_T)
    else:
        expert, pairs = unsorted_tile(tile, ids, P, E, BLOCK_P, BLOCK_T)
    if tl.max(pairs, 0) < 0:
        return
    lanes = tl.arange(0, BLOCK_N)
    if GATED:
        columns = block * OUTPUTS + lanes // 2
        rows = columns + (lanes % 2) * N
    else:
        columns = block * OUTPUTS + lanes
        rows = columns
    has_pair, has_column = (pairs >= 0)[None, :], (columns < N)[:, None]
    x_at = x + (pairs // pairs_of_row).to(tl.int64)[None, :] * x_stride
    weight += expert.to(tl.int64) * expert_stride
    if scale is not None:
        scale += expert.to(tl.int64) * scale_stride
    rows_N1 = rows.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    part = tl.program_id(1)
    for start in range(part * part_blocks * BLOCK_K, tl.minimum((part + 1) * part_blocks * BLOCK_K, K), BLOCK_K):
        features = start + tl.arange(0, BLOCK_K)[:, None]
        values = expert_weight_tile(
            weight, scale, book, row_stride, rows_N1, has_column, start, K,
            FORMAT, BLOCKSIZE, ALIGNED, EVEN_K, BLOCK_K, x.dtype.element_ty,
        )
        right = tl.load(x_at + features, has_pair if EVEN_K else has_pair & (features < K), 0.0)
        total = tl.dot(values, right, total, input_precision="ieee")
    if FORMAT == "int8" or FORMAT == "fp8":
        total *= (tl.load(scale + rows, columns < N, 0.0) * scale_factor)[:, None]
    result = tl.trans(total)
    if GATED:
        gate, up = tl.split(tl.reshape(result, (BLOCK_T, OUTPUTS, 2)))
        result = silu(gate) * up
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)
    out_at = out + (part * P + pairs).to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), (pairs >= 0)[:, None] & (outputs < N)[None, :])


@triton.jit(do_not_specialize=["T", "S"])
def sum_pairs_kernel(results, weights, ids, out, T, E, K, S, k, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K features of a token: the results [S, T * k, K] of its k pairs by weight; BLOCK_R of them are under way at once."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, S * k, BLOCK_R):
        results_R = first + tl.arange(0, BLOCK_R)
        part, pair = results_R // k, token * k + results_R % k
        exists = results_R < S * k
        id = tl.load(ids + pair, exists, -1)
        weight = tl.load(weights + pair, exists, 0.0)
        mask = ((id >= 0) & (id < E))[:, None] & (columns < K)[None, :]
        result = tl.load(results + (part.to(tl.int64) * T * k + pair)[:, None] * K + columns[None, :], mask, 0.0)
        total += tl.sum(tl.where(mask, weight[:, None] * result, 0.0), 0)
    tl.store(out + token * K + columns, total.to(out.dtype.element_ty), columns < K)
