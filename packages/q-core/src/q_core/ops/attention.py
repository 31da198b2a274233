"""Attention over a paged KV cache.

The cache has one layout on every backend, [B, G, S, D]: B blocks, G kv heads, S slots a block, D head dim. Slot number
``block * S + offset`` holds one token. Request r reads the blocks ``block_tables[r]`` in order.
"""

from __future__ import annotations

from torch import Tensor

from q_core import hookspecs
from q_core.dispatch import bound
from q_core.specs import attention as spec

_write_kv = bound(hookspecs.write_kv)
_paged_attention = bound(hookspecs.paged_attention)
_copy_kv_blocks = bound(hookspecs.copy_kv_blocks)


def write_kv(
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale_BGS: Tensor | None = None,
    v_scale_BGS: Tensor | None = None,
) -> None:
    """Write new keys and values into their slots of the cache.

    An int8 or float8_e4m3fn cache holds codes with one scale a token and head, the absmax of its D values: ``x ≈ code * absmax / peak``
    with a peak of 127 or 448. In float32, each step rounded: ``code = round(x * (peak / absmax))``, half to even, or of
    ``x / absmax * peak`` where peak / absmax overflows, rounded to the nearest code of the dtype; where absmax is zero or not finite
    (NaN if any value is, else infinity) all codes are 0, and the scale is stored as it is.

    Args:
        k_TGD, v_TGD: float32, bfloat16 or float16 [T, G, D], any strides.
        k_cache_BGSD, v_cache_BGSD: k's and v's dtype, or both int8, or both float8_e4m3fn [B, G, S, D], contiguous; mutated.
        slot_mapping: int64 [T], slot of each token; a negative one skips its token. Slots are distinct and below B * S (the values
            are the caller's promise: checking them would wait for the device).
        k_scale_BGS, v_scale_BGS: float32 [B, G, S], contiguous, of a quantized cache, and only of one; mutated.

    Raises:
        RuntimeError: k or v requires grad while gradients are recorded; the cache has none.
    """
    spec.check_write_kv(k_TGD, v_TGD, k_cache_BGSD, v_cache_BGSD, slot_mapping, k_scale_BGS, v_scale_BGS)
    _write_kv(k_TGD, v_TGD, k_cache_BGSD, v_cache_BGSD, slot_mapping, k_scale_BGS, v_scale_BGS)


def paged_attention(
    q_THD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    max_seq_len: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    k_scale_BGS: Tensor | None = None,
    v_scale_BGS: Tensor | None = None,
) -> Tensor:
    """Attend over the paged cache: prefill, chunked prefill, decode, or a mix in one batch.

    The queries of request r are rows ``query_start[r]…query_start[r+1]-1`` of ``q_THD`` and stand at the *last* positions of its
    sequence of ``seq_lens[r]`` tokens, all of which are in the cache (write first, then attend). Query head h reads kv head
    ``h // (H / G)``. Scores and softmax are float32 or better. What lies outside of a request's sequence, or before the windows of all its
    queries, has no influence, NaN or not. A NaN in the sequence that the mask hides from a query may reach it or not.

    Args:
        q_THD: float32, bfloat16 or float16 [T, H, D], H a multiple of G.
        k_cache_BGSD, v_cache_BGSD: q's dtype, or both int8, or both float8_e4m3fn [B, G, S, D], contiguous.
        block_tables: int32 [R, M]; entries beyond a request's last block are not read.
        query_start: int32 [R + 1], from 0 to T, ascending; a request may have no query.
        seq_lens: int32 [R], at least the request's number of queries.
        max_query_len, max_seq_len: upper bounds of the requests' query and sequence lengths, plain ints, so that no backend has to wait
            for the device to learn them.
        scale: factor of the scores, by default 1 / sqrt(D).
        causal: a query sees no key after its own position.
        window: sliding window: a query at position p sees no key before p - window + 1. Needs ``causal``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before masking.
        sinks_H: float32 [H], a logit a head that takes part in the softmax and has no value (attention sinks).
        k_scale_BGS, v_scale_BGS: float32 [B, G, S], contiguous, of a quantized cache as :func:`write_kv` writes it, and only of one.

    Returns:
        Tensor [T, H, D] of q's dtype, contiguous. It has no gradient: a backward through it raises.
    """
    if scale is None:
        scale = q_THD.shape[-1] ** -0.5
    arguments = (
        q_THD, k_cache_BGSD, v_cache_BGSD, block_tables, query_start, seq_lens, max_query_len, max_seq_len, scale, causal,
        window, softcap, sinks_H, k_scale_BGS, v_scale_BGS,
    )  # fmt: skip
    spec.check_paged_attention(*arguments)
    return _paged_attention(*arguments)


def copy_kv_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """Copy blocks of a cache, or of its scales, as if all were read before any is written.

    Args:
        src: [B, ...], contiguous, any dtype.
        dst: [B', ...], contiguous, src's dtype and block shape; on any device, and may be ``src`` itself; mutated.
        pairs: int64 [n, 2], on src's device: block of src, block of dst. Each below its B, destinations distinct (the caller's promise).
    """
    spec.check_copy_kv_blocks(src, dst, pairs)
    _copy_kv_blocks(src, dst, pairs)
