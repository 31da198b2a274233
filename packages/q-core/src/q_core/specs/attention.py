"""Records of the attention family."""

from __future__ import annotations

import torch
from torch import Tensor

from q_core.record import OpRecord
from q_core.samples import attention as samples
from q_core.specs import bounds, check


def _check_cache(op: str, k_cache_BGSD: Tensor, v_cache_BGSD: Tensor) -> None:
    check.same_dtype(op, "v_cache_BGSD", v_cache_BGSD, "k_cache_BGSD", k_cache_BGSD.dtype)
    if k_cache_BGSD.dim() != 4:
        check.wrong_shape(op, "k_cache_BGSD", check.shape_of(k_cache_BGSD), "[B, G, S, D]")
    if v_cache_BGSD.shape != k_cache_BGSD.shape:
        check.wrong_shape(op, "v_cache_BGSD", check.shape_of(v_cache_BGSD), f"k's {check.shape_of(k_cache_BGSD)}")
    for argument, cache in (("k_cache_BGSD", k_cache_BGSD), ("v_cache_BGSD", v_cache_BGSD)):
        if not cache.is_contiguous():
            raise ValueError(f"{op}: {argument} has strides {cache.stride()}, expected a contiguous [B, G, S, D].")


def check_write_kv(k_TGD: Tensor, v_TGD: Tensor, k_cache_BGSD: Tensor, v_cache_BGSD: Tensor, slot_mapping: Tensor) -> None:
    op = "write_kv"
    names = ("k_TGD", "v_TGD", "k_cache_BGSD", "v_cache_BGSD", "slot_mapping")
    check.one_device(op, names, k_TGD, v_TGD, k_cache_BGSD, v_cache_BGSD, slot_mapping)
    check.floating(op, "k_cache_BGSD", k_cache_BGSD)
    _check_cache(op, k_cache_BGSD, v_cache_BGSD)
    _, G, _, D = k_cache_BGSD.shape
    check.same_dtype(op, "k_TGD", k_TGD, "the cache", k_cache_BGSD.dtype)
    check.same_dtype(op, "v_TGD", v_TGD, "the cache", k_cache_BGSD.dtype)
    if k_TGD.dim() != 3 or k_TGD.shape[1:] != (G, D):
        check.wrong_shape(op, "k_TGD", check.shape_of(k_TGD), f"[T, {G}, {D}], as the cache has G and D")
    if v_TGD.shape != k_TGD.shape:
        check.wrong_shape(op, "v_TGD", check.shape_of(v_TGD), f"k's {check.shape_of(k_TGD)}")
    check.exact_dtype(op, "slot_mapping", slot_mapping, torch.int64)
    if slot_mapping.shape != k_TGD.shape[:1]:
        check.wrong_shape(op, "slot_mapping", check.shape_of(slot_mapping), f"[{k_TGD.shape[0]}], one a token")


def check_paged_attention(
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
) -> None:
    op = "paged_attention"
    names = ("q_THD", "k_cache_BGSD", "v_cache_BGSD", "block_tables", "query_start", "seq_lens")
    check.one_device(op, names, q_THD, k_cache_BGSD, v_cache_BGSD, block_tables, query_start, seq_lens)
    check.floating(op, "q_THD", q_THD)
    check.same_dtype(op, "k_cache_BGSD", k_cache_BGSD, "q_THD", q_THD.dtype)
    _check_cache(op, k_cache_BGSD, v_cache_BGSD)
    _, G, S, D = k_cache_BGSD.shape
    if q_THD.dim() != 3 or q_THD.shape[2] != D:
        check.wrong_shape(op, "q_THD", check.shape_of(q_THD), f"[T, H, {D}], as the cache has D")
    if G == 0 or q_THD.shape[1] % G:
        check.wrong_shape(op, "q_THD", check.shape_of(q_THD), f"H a multiple of the cache's {G} kv heads")
    for argument, tensor, dim in (
        ("block_tables", block_tables, 2), ("query_start", query_start, 1), ("seq_lens", seq_lens, 1),
    ):  # fmt: skip
        check.exact_dtype(op, argument, tensor, torch.int32)
        if tensor.dim() != dim:
            check.wrong_shape(op, argument, check.shape_of(tensor), f"{dim} axes")
    R = seq_lens.shape[0]
    if block_tables.shape[0] != R:
        check.wrong_shape(op, "block_tables", check.shape_of(block_tables), f"[{R}, M], one row a request as in seq_lens")
    if query_start.shape[0] != R + 1:
        check.wrong_shape(op, "query_start", check.shape_of(query_start), f"[{R + 1}], one more than seq_lens has")
    if max_query_len < 0:
        check.wrong_value(op, "max_query_len", max_query_len, "0 or more")
    if not 0 <= max_seq_len <= block_tables.shape[1] * S:
        expected = f"0…{block_tables.shape[1] * S}, the tokens that {block_tables.shape[1]} blocks a request hold"
        check.wrong_value(op, "max_seq_len", max_seq_len, expected)


def fake_paged_attention(
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
    check_paged_attention(
        q_THD, k_cache_BGSD, v_cache_BGSD, block_tables, query_start, seq_lens, max_query_len, max_seq_len, scale, causal
    )
    return q_THD.new_empty(q_THD.shape)


RECORDS = (
    OpRecord(
        name="write_kv",
        family="attention",
        check=check_write_kv,
        fake=check_write_kv,
        samples=samples.write_kv,
        mutates=("k_cache_BGSD", "v_cache_BGSD"),
    ),
    OpRecord(
        name="paged_attention",
        family="attention",
        check=check_paged_attention,
        fake=fake_paged_attention,
        samples=samples.paged_attention,
        bound=bounds.paged_attention,
    ),
)
