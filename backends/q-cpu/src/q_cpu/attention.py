"""The paged KV cache and attention over it. Contracts: :mod:`q_core.ops.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from q_core.backend import impl
from q_cpu.runtime import native
from q_cpu.support import decline_dtype, with_contiguous_last_axis


def _readable(cache: Tensor) -> Tensor:
    """A cache as the native module takes it: float8 as bytes."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


def _accepts_write(k_TGD: Tensor) -> str | None:
    return decline_dtype("k_TGD", k_TGD.dtype)


def _accepts_attention(q_THD: Tensor) -> str | None:
    return decline_dtype("q_THD", q_THD.dtype)


def _accepts_copy(src: Tensor, dst: Tensor) -> str | None:
    return None if src.device == dst.device else f"dst is on {dst.device}, only {src.device} as src"


@impl(accepts=_accepts_write)
def write_kv(
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    slot_mapping: Tensor,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
) -> None:
    """Write new keys and values into their slots of the paged cache."""
    B, G, S, D = k_cache_BGSD.shape
    native.write_kv(
        with_contiguous_last_axis(k_TGD), with_contiguous_last_axis(v_TGD), _readable(k_cache_BGSD), _readable(v_cache_BGSD),
        slot_mapping.contiguous(), k_scale_BGS, v_scale_BGS, k_TGD.shape[0], B, G, S, D,
    )  # fmt: skip


@impl(accepts=_accepts_attention)
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
    """Attend over a paged cache; a query's result doesn't depend on what else is in the call, nor on how its request came in parts."""
    (T, H, D), (R, M), (B, G, S, _) = q_THD.shape, block_tables.shape, k_cache_BGSD.shape
    out = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    native.paged_attention(
        with_contiguous_last_axis(q_THD), _readable(k_cache_BGSD), _readable(v_cache_BGSD), block_tables.contiguous(),
        query_start.contiguous(), seq_lens.contiguous(), max_query_len, max_seq_len, scale, causal, window or 0, softcap or 0.0,
        None if sinks_H is None else sinks_H.contiguous(), k_scale_BGS, v_scale_BGS, T, H, R, M,
        B, G, S, D, out,
    )  # fmt: skip
    return out


@impl(accepts=_accepts_copy)
def copy_kv_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """Copy blocks of a paged cache: for copy-on-write, swapping and transfer."""
    block_bytes = src.shape[1:].numel() * src.itemsize
    native.copy_kv_blocks(
        src.view(torch.uint8), dst.view(torch.uint8), pairs.contiguous(), pairs.shape[0], src.shape[0], dst.shape[0], block_bytes
    )
