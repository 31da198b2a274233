"""Reference of the attention family: padded to the longest request, so that no shape depends on a value and nothing is waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from q_core.backend import impl
from q_core.reference.widen import widen


@impl
def write_kv(k_TGD: Tensor, v_TGD: Tensor, k_cache_BGSD: Tensor, v_cache_BGSD: Tensor, slot_mapping: Tensor) -> None:
    T, S = k_TGD.shape[0], k_cache_BGSD.shape[2]
    if T == 0 or k_cache_BGSD.shape[0] == 0:
        return
    # A skipped token writes what the first kept one writes, where that one does; if none is kept, slot 0 gets its own value.
    kept = slot_mapping >= 0
    source = torch.where(kept, torch.arange(T, device=kept.device), kept.int().argmax())
    slots = slot_mapping[source].clamp_min(0)
    block, offset = slots // S, slots % S
    for new, cache in ((k_TGD, k_cache_BGSD), (v_TGD, v_cache_BGSD)):
        cache[block, :, offset] = torch.where(kept.any(), new[source], cache[block, :, offset])


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
    k, v = (widen(cache[table]).transpose(1, 2).reshape(R, G, -1, D)[:, :, :max_seq_len] for cache in (k_cache_BGSD, v_cache_BGSD))
    key_position = torch.arange(max_seq_len, device=device)
    in_sequence = key_position < seq_lens[:, None]
    # A weight of zero doesn't silence a NaN, which the unused slots of a block may hold.
    v = v.masked_fill(~in_sequence[:, None, :, None], 0.0)

    visible = in_sequence[:, None, :].expand(R, max_query_len, max_seq_len)
    if causal:
        visible = visible & (key_position <= query_position[:, :, None])
    scores = torch.einsum("rqghd,rgld->rghql", q.view(R, max_query_len, G, H // G, D), k) * scale
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    padded = torch.einsum("rghql,rgld->rqghd", weights, v).reshape(R, max_query_len, H, D)

    token = torch.arange(T, device=device)
    request = torch.searchsorted(query_start[1:].contiguous(), token, right=True).clamp_max(R - 1)
    return padded[request, token - query_start[request]].to(q_THD.dtype)
