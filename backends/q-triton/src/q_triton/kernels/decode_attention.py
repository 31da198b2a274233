"""Attention of requests with few queries: the keys of a request are split among programs, and a second kernel merges what they found.

R requests, H query heads, G kv heads, D head dim, S slots of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.flash import attend, load_queries, mean


@triton.jit(do_not_specialize=["G", "queries", "splits", "table_stride", "window"])
def decode_kernel(
    q, k_cache, v_cache, k_scale, v_scale, block_tables, query_start, seq_lens, sinks, out, parts, tops, totals,
    H, G, queries, splits, table_stride, q_token_stride, q_head_stride, scale, value_scale, softcap, window,
    S: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_E4M3: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One kv head of one request, one split of the keys that its queries reach, and BLOCK_M rows of (query, head of the group).

    Requests of more than ``queries`` queries are left out. With one split the result goes to ``out``, and ``parts`` is None; else
    ``acc``, ``top`` and ``total`` go to the three [R, queries, H, splits, …].
    """
    request = tl.program_id(0) // G
    kv_head = tl.program_id(0) % G
    split = tl.program_id(1)
    token = tl.load(query_start + request)
    count = tl.load(query_start + request + 1) - token
    if count == 0 or count > queries:
        return
    length = tl.load(seq_lens + request)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP
    head = row % GROUP
    rows = query < count
    positions = length - count + query

    first = 0
    if window is not None:
        first = tl.maximum(length - count - window + 1, 0)
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_N), splits) * BLOCK_N
    first += split * share
    last = tl.minimum(first + share, length)

    first_token = token.to(tl.int64)
    first_head = kv_head * GROUP
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    table = block_tables + request.to(tl.int64) * table_stride
    first_of_q = q + first_token * q_token_stride + first_head.to(tl.int64) * q_head_stride
    x = load_queries(first_of_q, rows, query, head, q_token_stride, q_head_stride, D, BLOCK_D)
    acc, top, total = attend(
        acc, top, total, x, positions, first, last,
        k_cache, v_cache, k_scale, v_scale, table, kv_head, G, scale, softcap, window,
        S, D, CAUSAL, True, HAS_E4M3, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = rows[:, None] & (columns < D)
    if parts is None:
        result = mean(acc, top, total, sinks, first_head + head, rows, value_scale)
        places = (query * H + head)[:, None] * D + columns
        tl.store(out + (first_token * H + first_head) * D + places, result.to(out.dtype.element_ty), mask)
    else:
        places = ((request.to(tl.int64) * queries + query) * H + first_head + head) * splits + split
        tl.store(parts + places[:, None] * D + columns, acc, mask & (first < last))
        tl.store(tops + places, top, rows)
        tl.store(totals + places, total, rows)


@triton.jit(do_not_specialize=["H", "queries", "splits"])
def merge_kernel(
    parts, tops, totals, query_start, sinks, out, H, queries, splits, value_scale,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one query of a request: its splits in their order, BLOCK_P at a time."""
    head = tl.program_id(0) % H
    query = (tl.program_id(0) // H) % queries
    request = tl.program_id(0) // H // queries
    token = tl.load(query_start + request)
    count = tl.load(query_start + request + 1) - token
    if query >= count or count > queries:
        return
    columns = tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for start in range(0, splits, BLOCK_P):
        split = start + tl.arange(0, BLOCK_P)
        places = tl.program_id(0).to(tl.int64) * splits + split
        part_top = tl.load(tops + places, split < splits, float("-inf"))
        part_total = tl.load(totals + places, split < splits, 0.0)
        # A split without a key that the query sees has a total of 0, and may have nothing else; NaN is no such total.
        part = tl.load(parts + places[:, None] * D + columns, (part_total != 0.0)[:, None] & (columns < D), 0.0)
        new_top = tl.maximum(top, tl.max(part_top, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(part_top - base)
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(part_total * weights, 0)
        acc = acc * fade[:, None] + tl.sum(part * weights[:, None], 0)[None, :]
        top = new_top
    row = tl.arange(0, 1) == 0
    result = mean(acc, top, total, sinks, head + tl.arange(0, 1), row, value_scale)
    place = (token + query).to(tl.int64) * H + head
    tl.store(out + place * D + columns, result.to(out.dtype.element_ty), columns < D)
