"""The paged KV cache and attention over it. Contracts: :mod:`q_core.ops.attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from q_core.backend import impl
from q_triton.kernels.decode_attention import decode_kernel, merge_kernel
from q_triton.kernels.kv_cache import copy_blocks_kernel, write_kv_kernel
from q_triton.kernels.prefill_attention import prefill_kernel
from q_triton.launch import launch
from q_triton.shapes import ceil_div, power_of_two, with_contiguous_last_axis
from q_triton.targets import target_of
from q_triton.tiles import Tile, Tiles, tile

WRITE_KV = Tiles("write_kv", (tile(BLOCK_R=16, up_to=64), tile(BLOCK_R=8, up_to=128), tile(BLOCK_R=4)), size="head dim")
COPY_BLOCKS = Tiles("copy_kv_blocks", (tile(BLOCK_W=1024),))
DECODE = {
    "": Tiles(
        "decode_attention",
        (
            tile(BLOCK_M=32, BLOCK_N=64, stages=2, up_to=64),
            tile(BLOCK_M=32, BLOCK_N=16, stages=2, up_to=128),
            tile(BLOCK_M=16, BLOCK_N=16),
        ),
        size="head dim",
    ),
    "codes": Tiles(
        "decode_attention_codes",
        (
            tile(BLOCK_M=32, BLOCK_N=32, stages=2, up_to=64),
            tile(BLOCK_M=16, BLOCK_N=16, warps=8, stages=2, up_to=128),
            tile(BLOCK_M=16, BLOCK_N=16),
        ),
        size="head dim",
    ),
    "float32": Tiles(
        "decode_attention_float32",
        (
            tile(BLOCK_M=16, BLOCK_N=16, up_to=64),
            tile(BLOCK_M=16, BLOCK_N=16, warps=8, up_to=128),
        ),
        size="head dim",
    ),
}
"""By what is multiplied: the cache's values, what its codes stand for, or float32, for which few GPUs have matrix instructions: it takes
so many registers that not every GPU has a tile for long heads.

Here BLOCK_M is the most rows that a program may get.
"""
MERGE = Tiles("merge_attention", (tile(BLOCK_P=16),))
PREFILL = {
    "": Tiles(
        "prefill_attention",
        (
            tile(BLOCK_M=64, BLOCK_N=32, stages=2, up_to=64),
            tile(BLOCK_M=64, BLOCK_N=16, warps=8, up_to=128),
            tile(BLOCK_M=16, BLOCK_N=16, warps=8),
        ),
        size="head dim",
    ),
    "codes": Tiles(
        "prefill_attention_codes",
        (tile(BLOCK_M=32, BLOCK_N=16, up_to=128), tile(BLOCK_M=16, BLOCK_N=16, warps=8)),
        size="head dim",
    ),
    "float32": Tiles(
        "prefill_attention_float32",
        (
            tile(BLOCK_M=32, BLOCK_N=16, up_to=64),
            tile(BLOCK_M=16, BLOCK_N=16, warps=8, up_to=128),
        ),
        size="head dim",
    ),
}

PROGRAMS = 2048
"""As many programs keep a large GPU busy to the end, some of which take longer than others."""

REQUESTS = 128
"""How many a program of the prefill kernel looks at at once, to find its own."""

PEAKS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest code of a quantized cache, which stands for its scale."""


def _as_codes(cache: Tensor) -> Tensor:
    """A cache as kernels take it: float8 as bytes."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


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
    """Write new keys and values into their slots of the paged cache."""
    (T, G, D), S = k_TGD.shape, k_cache_BGSD.shape[2]
    k, v = with_contiguous_last_axis(k_TGD), with_contiguous_last_axis(v_TGD)
    chosen = WRITE_KV.on(k.device, D)
    launch(
        write_kv_kernel, (ceil_div(T * G, chosen.blocks["BLOCK_R"]), 2), _with(chosen, BLOCK_D=power_of_two(D)), exact=True,
        k=k, v=v, k_cache=_as_codes(k_cache_BGSD), v_cache=_as_codes(v_cache_BGSD), slot_mapping=slot_mapping.contiguous(),
        k_scale=k_scale_BGS, v_scale=v_scale_BGS, T=T, G=G, S=S, D=D,
        k_token_stride=k.stride(0), k_head_stride=k.stride(1), v_token_stride=v.stride(0), v_head_stride=v.stride(1),
    )  # fmt: skip


def _multiplied(q_THD: Tensor, k_cache_BGSD: Tensor) -> str:
    """What :data:`DECODE` and :data:`PREFILL` distinguish."""
    if q_THD.dtype is torch.float32:
        return "float32"
    return "codes" if k_cache_BGSD.dtype in PEAKS else ""


def _accepts_heads(q_THD: Tensor, k_cache_BGSD: Tensor) -> str | None:
    D, device, kind = q_THD.shape[2], q_THD.device, _multiplied(q_THD, k_cache_BGSD)
    if all(tiles[kind].covers(device, D) for tiles in (DECODE, PREFILL)):
        return None
    return f"heads of {D} in {kind}, too long for the registers of {target_of(device).name}"


@impl(accepts=_accepts_heads)
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
    """Attend over a paged cache.

    Requests of few queries, such as those that decode, go to a kernel that splits their keys among programs: they are bound by reading
    the cache, and one program a kv head would leave most of a GPU idle. The others go to one that splits their queries. Which are where is
    on the device alone, so a batch that may have both goes to both, and each passes over the other's requests.
    """
    (T, H, D), R, (_, G, S, _) = q_THD.shape, seq_lens.shape[0], k_cache_BGSD.shape
    if T * H * D * R * max_seq_len == 0:
        return q_THD.new_zeros(q_THD.shape)
    if scale < 0.0:  # kernels take the largest score for that of the largest logit
        q_THD, scale = -q_THD, -scale
    q = with_contiguous_last_axis(q_THD)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tables = with_contiguous_last_axis(block_tables)
    bits = math.log2(math.e)
    peak = PEAKS.get(k_cache_BGSD.dtype, 1.0)
    common: dict[str, Any] = {
        "q": q, "k_cache": _as_codes(k_cache_BGSD), "v_cache": _as_codes(v_cache_BGSD), "k_scale": k_scale_BGS, "v_scale": v_scale_BGS,
        "block_tables": tables, "query_start": query_start.contiguous(), "seq_lens": seq_lens.contiguous(),
        "sinks": None if sinks_H is None else sinks_H.contiguous(), "out": out, "H": H, "G": G,
        "table_stride": tables.stride(0), "q_token_stride": q.stride(0), "q_head_stride": q.stride(1),
        "scale": scale / peak * bits, "value_scale": 1.0 / peak, "softcap": None if softcap is None else softcap * bits,
        "window": window, "S": S, "D": D, "GROUP": H // G, "CAUSAL": causal, "HAS_E4M3": target_of(q.device).has_e4m3,
    }  # fmt: skip
    kind = _multiplied(q_THD, k_cache_BGSD)
    few = max(1, DECODE[kind].on(q.device, D).blocks["BLOCK_M"] // (H // G))  # as many as one program's rows hold, or one
    if max_query_len <= few:
        _decode(common, kind, R, max(max_query_len, 1), max_seq_len)
    elif R * max_query_len == T:
        _prefill(common, kind, T, R, fewest=1)
    else:
        _decode(common, kind, R, few, max_seq_len)
        _prefill(common, kind, T, R, fewest=few + 1)
    return out


def _decode(common: dict[str, Any], kind: str, R: int, queries: int, max_seq_len: int) -> None:
    """Serve the requests of up to ``queries`` queries."""
    q, out, (H, D, group) = common["q"], common["out"], (common[name] for name in ("H", "D", "GROUP"))
    chosen = DECODE[kind].on(q.device, D)
    BLOCK_M, BLOCK_N = min(chosen.blocks["BLOCK_M"], max(16, power_of_two(queries * group))), chosen.blocks["BLOCK_N"]
    BLOCK_D = max(16, power_of_two(D))
    row_blocks = ceil_div(queries * group, BLOCK_M)
    window = common["window"]
    reach = max_seq_len if window is None else min(max_seq_len, window + queries - 1)
    programs = R * common["G"] * row_blocks
    # Two tiles of keys are the least that is worth a program and its part of the result.
    splits = max(1, min(PROGRAMS // programs, ceil_div(reach, 2 * BLOCK_N)))
    shape = (R, queries, H, splits)
    parts, tops, totals = (
        None if splits == 1 else torch.empty((*shape, *last), dtype=torch.float32, device=q.device) for last in ((D,), (), ())
    )
    launch(
        decode_kernel, (R * common["G"], splits, row_blocks), _with(chosen, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D),
        **common, parts=parts, tops=tops, totals=totals, queries=queries, splits=splits,
    )  # fmt: skip
    if parts is not None:
        launch(
            merge_kernel, (R * queries * H,), _with(MERGE.on(q.device), BLOCK_D=BLOCK_D),
            parts=parts, tops=tops, totals=totals, query_start=common["query_start"], sinks=common["sinks"], out=out,
            H=H, queries=queries, splits=splits, value_scale=common["value_scale"], D=D,
        )  # fmt: skip


def _prefill(common: dict[str, Any], kind: str, T: int, R: int, *, fewest: int) -> None:
    """Serve the requests of ``fewest`` queries and more."""
    q, D = common["q"], common["D"]
    chosen = PREFILL[kind].on(q.device, D)
    # A request may begin and end within a tile's worth of rows: one tile each more than if they came without gaps.
    tiles = T * common["GROUP"] // chosen.blocks["BLOCK_M"] + R
    launch(
        prefill_kernel, (tiles, common["G"]), _with(chosen, BLOCK_D=max(16, power_of_two(D)), BLOCK_R=REQUESTS),
        **common, R=R, fewest=fewest,
    )  # fmt: skip


@impl
def copy_kv_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """Copy blocks of a paged cache: for copy-on-write, swapping and transfer."""
    n, size = pairs.shape[0], src.shape[1:].numel() * src.itemsize
    source, target = src.view(torch.uint8), dst.view(torch.uint8)
    if src.device != dst.device:
        blocks = source.view(src.shape[0], size).index_select(0, pairs[:, 0])
        target.view(dst.shape[0], size).index_copy_(0, pairs[:, 1].to(dst.device), blocks.to(dst.device))
    elif source.untyped_storage().data_ptr() != target.untyped_storage().data_ptr():
        _copy(source, target, pairs, size, gather=True, scatter=True)
    else:
        scratch = torch.empty((n, size), dtype=torch.uint8, device=src.device)
        _copy(source, scratch, pairs, size, gather=True, scatter=False)
        _copy(scratch, target, pairs, size, gather=False, scatter=True)


def _copy(src: Tensor, dst: Tensor, pairs: Tensor, size: int, *, gather: bool, scatter: bool) -> None:
    """Copy blocks of ``size`` bytes: of src, those of the pairs or all; to dst likewise."""
    BYTES = math.gcd(8, size, src.data_ptr(), dst.data_ptr())
    chosen = COPY_BLOCKS.on(src.device)
    launch(
        copy_blocks_kernel, (pairs.shape[0], ceil_div(size // BYTES, chosen.blocks["BLOCK_W"])), chosen,
        src=src, dst=dst, pairs=pairs.contiguous(), words=size // BYTES, GATHER=gather, SCATTER=scatter, BYTES=BYTES,
    )  # fmt: skip


def _with(chosen: Tile, **blocks: int) -> Tile:
    """A tile with blocks of the sizes that a call has."""
    return Tile({**chosen.blocks, **blocks}, chosen.warps, chosen.stages)
