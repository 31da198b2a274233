"""Reference of the attention family: padded to the longest request, so that no shape depends on a value and nothing is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from q_core.backend import impl
from q_core.reference.widen import widen

PEAKS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of the last axis, and its absmax."""
    x, peak = x.float(), PEAKS[dtype]
    absmax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    divisor = absmax.unsqueeze(-1)
    factor = torch.full_like(divisor, peak) / divisor
    scaled = torch.where(factor.isfinite(), x * factor, x / divisor * peak).clamp(-peak, peak)
    scaled = torch.where((divisor > 0) & divisor.isfinite(), scaled, 0.0)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), absmax


def decode(cache: Tensor, scale: Tensor | None) -> Tensor:
    """A cache, or blocks of one, in float32; float64 stays."""
    if scale is None:
        return widen(cache)
    return cache.float() * (scale / PEAKS[cache.dtype]).unsqueeze(-1)


@impl
def copy_kv_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    blocks = src[pairs[:, 0]] if src.dtype.itemsize > 1 else src.view(torch.uint8)[pairs[:, 0]]
    dst.view(blocks.dtype)[pairs[:, 1].to(dst.device)] = blocks.to(dst.device)


@impl
def write_kv(
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    slot_mapping: Tensor,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
) -> None:
    T, S = k_TGD.shape[0], k_cache_BGSD.shape[2]
    if T == 0 or k_cache_BGSD.shape[0] == 0:
        return
    # A skipped token writes what the first kept one writes, where that one does; if none is kept, slot 0 gets its own value.
    kept = slot_mapping >= 0
    source = torch.where(kept, torch.arange(T, device=kept.device), kept.int().argmax())
    slots = slot_mapping[source].clamp_min(0)
    block, offset = slots // S, slots % S
    targets = []
    for new, cache, scale in ((k_TGD, k_cache_BGSD, k_scale_BGS), (v_TGD, v_cache_BGSD, v_scale_BGS)):
        if scale is None:
            targets.append((new, cache))
        else:
            codes, absmax = encode(new, cache.dtype)
            # As bytes: float8 has no selection of its own.
            targets += [(codes.view(torch.uint8), cache.view(torch.uint8)), (absmax, scale)]
    for new, cache in targets:
        cache[block, :, offset] = torch.where(kept.any(), new[source], cache[block, :, offset])


def _gather(cache: Tensor, scale: Tensor | None, table: Tensor) -> Tensor:
    """Blocks [R, M, G, S, D] of a cache, decoded."""
    if scale is None:
        return widen(cache[table])
    return decode(cache.view(torch.uint8)[table].view(cache.dtype), scale[table])


@impl
def paged_attention(
    q_THD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
) -> Tensor:
    T, H, D = q_THD.shape
    B, G, S, _ = k_cache_BGSD.shape
    R = seq_lens.shape[0]
    if T == 0 or R == 0 or max_seq_len == 0:
        return q_THD.new_zeros(q_THD.shape)
    device = q_THD.device
    query_start, seq_lens = query_start.long(), seq_lens.long()
    query_lens = query_start[1:] - query_start[:-1]

    # Queries, [R, Q, H, D]: rows past a request's last are copies of some row and come to nothing.
    column = torch.arange(max_query_len, device=device)
    q = widen(q_THD)[(query_start[:-1, None] + column).clamp_max(T - 1)]
    query_position = (seq_lens - query_lens)[:, None] + column

    # Keys and values, [R, G, L, D]: table entries past a request's last block may be anything.
    table = block_tables[:, : -(-max_seq_len // S)].long().clamp(0, B - 1)
    k, v = (
        _gather(cache, cache_scale, table).transpose(1, 2).reshape(R, G, -1, D)[:, :, :max_seq_len].to(q.dtype)
        for cache, cache_scale in ((k_cache_BGSD, k_scale_BGS), (v_cache_BGSD, v_scale_BGS))
    )
    key_position = torch.arange(max_seq_len, device=device)
    in_sequence = key_position < seq_lens[:, None]
    # A weight of zero doesn't silence a NaN, which the unused slots of a block may hold, and the keys before every window.
    in_reach = in_sequence
    if window is not None:
        in_reach = in_reach & (key_position > query_position[:, :1] - window)
    v = v.masked_fill(~in_reach[:, None, :, None], 0.0)

    visible = in_sequence[:, None, :].expand(R, max_query_len, max_seq_len)
    if causal:
        visible = visible & (key_position <= query_position[:, :, None])
    if window is not None:
        visible = visible & (key_position > query_position[:, :, None] - window)
    scores = torch.einsum("rqghd,rgld->rghql", q.view(R, max_query_len, G, H // G, D), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.to(scores.dtype).view(1, G, H // G, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., :max_seq_len]
    padded = torch.einsum("rghql,rgld->rqghd", weights, v).reshape(R, max_query_len, H, D)

    token = torch.arange(T, device=device)
    request = torch.searchsorted(query_start[1:].contiguous(), token, right=True).clamp_max(R - 1)
    return padded[request, token - query_start[request]].to(q_THD.dtype)
