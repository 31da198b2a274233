"""Writing to the paged cache, [B, G, S, D], and copying its blocks. T tokens, G kv heads, D head dim, B blocks, S slots of a block."""

from __future__ import annotations

import triton
import triton.language as tl

from q_triton.kernels.codes import from_bits, to_e4m3, to_int8
from q_triton.kernels.scales import absmax_bits, stretched


@triton.jit
def _write_rows(
    new, cache, scales, slot_mapping, T, G, token_stride, head_stride, S, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK_R rows, each what one token has for one kv head; where the cache holds codes, their absmax is found and stored too."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = rows // G
    head = rows - token * G
    slot = tl.load(slot_mapping + token, token < T, -1)
    kept = slot >= 0
    block = slot // S
    target = (block * G + head) * S + (slot - block * S)
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = kept[:, None] & (columns < D)
    x = tl.load(new + token[:, None] * token_stride + head[:, None] * head_stride + columns, mask, 0.0)
    if scales is not None:
        x = x.to(tl.float32)
        bits = absmax_bits(x)
        tl.store(scales + target, from_bits(bits), kept)
        x = to_int8(stretched(x, bits, 127.0)) if cache.dtype.element_ty == tl.int8 else to_e4m3(stretched(x, bits, 448.0))
    tl.store(cache + target[:, None] * D + columns, x, mask)


@triton.jit(do_not_specialize=["T"])
def write_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, T, G, S, D,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of the keys or, by the grid's second axis, of the values. Caches of float8 are given as bytes."""
    if tl.program_id(1) == 0:
        _write_rows(k, k_cache, k_scale, slot_mapping, T, G, k_token_stride, k_head_stride, S, D, BLOCK_R, BLOCK_D)
    else:
        _write_rows(v, v_cache, v_scale, slot_mapping, T, G, v_token_stride, v_head_stride, S, D, BLOCK_R, BLOCK_D)


@triton.jit
def copy_blocks_kernel(
    src, dst, pairs, words, GATHER: tl.constexpr, SCATTER: tl.constexpr, BYTES: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """BLOCK_W words, of BYTES bytes each, of one pair's block. Without GATHER the pair's own number is the block of src, without SCATTER
    that of dst.
    """
    word: tl.constexpr = tl.int64 if BYTES == 8 else tl.int32 if BYTES == 4 else tl.int16 if BYTES == 2 else tl.int8
    pair = tl.program_id(0).to(tl.int64)
    source = tl.load(pairs + 2 * pair) if GATHER else pair
    target = tl.load(pairs + 2 * pair + 1) if SCATTER else pair
    within = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    content = tl.load(src.to(tl.pointer_type(word), bitcast=True) + source * words + within, within < words)
    tl.store(dst.to(tl.pointer_type(word), bitcast=True) + target * words + within, content, within < words)
