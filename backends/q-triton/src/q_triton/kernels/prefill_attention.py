"""Attention of requests with many queries, each with its own number of them, in tiles.

R requests, T tokens, H query heads, G kv heads, D head dim, S slots of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.flash import attend, load_queries, mean


@triton.jit
def _first_tile(request, token, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number of a request's first tile: so many are sure to suffice for the requests before it, of ``token`` queries in all."""
    return token.to(tl.int64) * GROUP // BLOCK_M + request


@triton.jit(do_not_specialize=["R", "G", "fewest", "table_stride", "window"])
def prefill_kernel(
    q, k_cache, v_cache, k_scale, v_scale, block_tables, query_start, seq_lens, sinks, out,
    R, H, G, fewest, table_stride, q_token_stride, q_head_stride, scale, value_scale, softcap, window,
    S: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_E4M3: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of (query, head of the group) of one request, for one kv head, over all keys that they see.

    Requests of less than ``fewest`` queries are left out. Only the tiles of keys at the edges of what the rows see are masked.
    """
    # Later tiles have more keys, and come first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    request = -1
    for start in range(0, R, BLOCK_R):
        requests = start + tl.arange(0, BLOCK_R)
        tokens = tl.load(query_start + requests, requests < R, 0)
        begun = (requests < R) & (_first_tile(requests, tokens, GROUP, BLOCK_M) <= tile)
        request += tl.sum(begun.to(tl.int32), 0)
    token = tl.load(query_start + request)
    count = tl.load(query_start + request + 1) - token
    first_row = (tile - _first_tile(request, token, GROUP, BLOCK_M)).to(tl.int32) * BLOCK_M
    if count < fewest or first_row >= count * GROUP:
        return
    length = tl.load(seq_lens + request)
    # Rows count from the tile's first query, not the request's: the place of each in `out` then takes 32 bits, 64 would cost registers.
    first_query = first_row // GROUP
    row = first_row % GROUP + tl.arange(0, BLOCK_M)
    query = row // GROUP
    head = row % GROUP
    rows = query < count - first_query
    first_position = length - count + first_query
    last_position = length - count + tl.minimum((first_row + BLOCK_M - 1) // GROUP, count - 1)
    positions = first_position + query

    first = 0
    inside = 0
    if window is not None:
        first = tl.maximum(first_position - window + 1, 0)
        inside = tl.maximum(last_position - window + 1, 0)
    last = last_position + 1 if CAUSAL else length
    whole = first_position + 1 if CAUSAL else length
    inside = tl.minimum(first + tl.cdiv(inside - first, BLOCK_N) * BLOCK_N, last)
    edge = inside + tl.maximum(whole - inside, 0) // BLOCK_N * BLOCK_N

    first_token = (token + first_query).to(tl.int64)
    first_head = kv_head * GROUP
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    table = block_tables + tl.cast(request, tl.int64) * table_stride
    first_of_q = q + first_token * q_token_stride + first_head.to(tl.int64) * q_head_stride
    x = load_queries(first_of_q, rows, query, head, q_token_stride, q_head_stride, D, BLOCK_D)
    if window is not None:
        acc, top, total = attend(
            acc, top, total, x, positions, first, inside,
            k_cache, v_cache, k_scale, v_scale, table, kv_head, G, scale, softcap, window,
            S, D, CAUSAL, True, HAS_E4M3, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, x, positions, inside, edge,
        k_cache, v_cache, k_scale, v_scale, table, kv_head, G, scale, softcap, window,
        S, D, CAUSAL, False, HAS_E4M3, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, x, positions, edge, last,
        k_cache, v_cache, k_scale, v_scale, table, kv_head, G, scale, softcap, window,
        S, D, CAUSAL, True, HAS_E4M3, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    result = mean(acc, top, total, sinks, first_head + head, rows, value_scale)
    columns = tl.arange(0, BLOCK_D)[None, :]
    places = (query * H + head)[:, None] * D + columns
    tl.store(out + (first_token * H + first_head) * D + places, result.to(out.dtype.element_ty), rows[:, None] & (columns < D))
