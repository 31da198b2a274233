"""Attention over tiles of keys and values in the paged cache, [B, G, S, D], with a softmax that is carried from tile to tile.

Rows are the queries of a request times the query heads of one kv head, which share its keys. Three things are known of a row: ``top``,
its largest logit so far; ``total``, the sum of its weights ``exp2(logit - top)``; ``acc``, the sum of the values by their weights. Logits
are in bits: times log2(e). G kv heads, D head dim, S slots of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_e4m3, narrowed

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_queries(q, rows, query, head, token_stride, head_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of queries, which count from the token and head that ``q`` points to; zero where ``rows`` says that there is none."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    places = query.to(tl.int64)[:, None] * token_stride + head.to(tl.int64)[:, None] * head_stride + columns
    return tl.load(q + places, rows[:, None] & (columns < D), 0.0)


@triton.jit
def _decoded(codes, element, HAS_E4M3: tl.constexpr):
    """What codes, int8 or float8_e4m3fn's bytes, stand for but for their scale, in a dtype that holds it exactly."""
    if codes.dtype == tl.int8:
        value = codes.to(tl.float32)  # slow but beside the other work: from_int8 would take a fifth more instructions
    elif HAS_E4M3:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    else:
        value = from_e4m3(codes)
    return narrowed(value, element)


@triton.jit
def _load_tile(cache, places, mask, element, WHOLE: tl.constexpr, HAS_E4M3: tl.constexpr):
    """Keys or values, in the queries' dtype."""
    tile = tl.load(cache + places) if WHOLE else tl.load(cache + places, mask, 0.0)
    if tile.dtype != element:
        even, odd = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
        tile = tl.interleave(_decoded(even, element, HAS_E4M3), _decoded(odd, element, HAS_E4M3))
    return tile


@triton.jit
def _capped(logits, cap):
    """``cap * tanh(logits / cap)``."""
    return cap * (2.0 / (1.0 + tl.exp2(logits * (-2.0 * LOG2_E / cap))) - 1.0)


@triton.jit
def attend(
    acc, top, total, q, positions, first, last,
    k_cache, v_cache, k_scale, v_scale, table, kv_head, G, scale, softcap, window,
    S: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_E4M3: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Carry the rows on over the keys ``first…last-1`` of a request, BLOCK_N at a time.

    Without MASKED every row sees all of them, and they come to whole tiles. With it, nothing at ``last`` and beyond is read. ``scale``,
    0 or more, takes scores to logits; ``softcap`` and ``window`` are None where there are none. The scale of a slot that holds codes goes
    to the key's scores and to the value's weights.
    """
    columns = tl.arange(0, BLOCK_D)[None, :]
    WHOLE: tl.constexpr = not MASKED and D == BLOCK_D
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        present = keys < last
        block = tl.load(table + keys // S, present, 0) if MASKED else tl.load(table + keys // S)
        slots = (block.to(tl.int64) * G + kv_head) * S + keys % S
        places = slots[:, None] * D + columns
        mask = present[:, None] & (columns < D)

        k = _load_tile(k_cache, places, mask, q.dtype, WHOLE, HAS_E4M3)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if k_scale is not None:
            scores *= tl.load(k_scale + slots, present, 0.0)[None, :]
        if MASKED or softcap is not None:
            logits = scores * scale
            if softcap is not None:
                logits = _capped(logits, softcap)
            if MASKED:
                visible = present[None, :]
                if CAUSAL:
                    visible = visible & (keys[None, :] <= positions[:, None])
                if window is not None:
                    visible = visible & (keys[None, :] > positions[:, None] - window)
                logits = tl.where(visible, logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(logits - base[:, None])
        else:
            # The scale isn't negative, so the largest score has the largest logit, and the others take one fused operation each.
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores * scale - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        if v_scale is not None:
            weights *= tl.load(v_scale + slots, present, 0.0)[None, :]
        v = _load_tile(v_cache, places, mask, q.dtype, WHOLE, HAS_E4M3)
        acc = tl.dot(weights.to(q.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def mean(acc, top, total, sinks, heads, rows, value_scale):
    """The values' mean by the weights of rows, after the sinks of their heads have taken their share."""
    if sinks is not None:
        sink = tl.load(sinks + heads, rows, 0.0) * LOG2_E
        base = tl.maximum(top, sink)
        base = tl.where(base == float("-inf"), 0.0, base)
        fade = tl.exp2(top - base)
        total = total * fade + tl.exp2(sink - base)
        acc = acc * fade[:, None]
    return acc * (value_scale / total)[:, None]
