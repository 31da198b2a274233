"""Records of the attention family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_core.operand import Operand
from q_core.record import OpRecord
from q_core.samples import attention as samples
from q_core.specs import bounds, check

CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)
"""Dtypes of a quantized cache."""


def _check_cache(
    op: str, new: str, dtype: torch.dtype, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """A cache for keys and values of ``dtype``, the dtype of the argument ``new``."""
    if k.dtype != dtype and k.dtype not in CODE_DTYPES:
        check.wrong_dtype(op, "k_cache_BGSD", k.dtype, f"{new}'s {check.short(dtype)}, int8 or float8_e4m3fn")
    check.same_dtype(op, "v_cache_BGSD", v, "k_cache_BGSD", k.dtype)
    if k.dim() != 4:
        check.wrong_shape(op, "k_cache_BGSD", check.shape_of(k), "[B, G, S, D]")
    if v.shape != k.shape:
        check.wrong_shape(op, "v_cache_BGSD", check.shape_of(v), f"k's {check.shape_of(k)}")
    contiguous = [("k_cache_BGSD", k), ("v_cache_BGSD", v)]
    for argument, scale in (("k_scale_BGS", k_scale), ("v_scale_BGS", v_scale)):
        if (scale is not None) != (k.dtype in CODE_DTYPES):
            expected = "float32 [B, G, S]" if scale is None else "None"
            check.wrong_value(
                op, argument, None if scale is None else "given", f"{expected} with a cache of {check.short(k.dtype)}"
            )
        if scale is not None:
            check.exact_dtype(op, argument, scale, torch.float32)
            if scale.shape != k.shape[:3]:
                check.wrong_shape(op, argument, check.shape_of(scale), f"{check.shape_of(k)[:3]}, as the cache has B, G and S")
            contiguous.append((argument, scale))
    for argument, tensor in contiguous:
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {argument} has strides {tensor.stride()}, expected a contiguous tensor.")


def check_write_kv(
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    slot_mapping: Tensor,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
) -> None:
    op = "write_kv"
    names = ("k_TGD", "v_TGD", "k_cache_BGSD", "v_cache_BGSD", "slot_mapping", "k_scale_BGS", "v_scale_BGS")
    check.one_device(op, names, k_TGD, v_TGD, k_cache_BGSD, v_cache_BGSD, slot_mapping, k_scale_BGS, v_scale_BGS)
    check.floating(op, "k_TGD", k_TGD)
    check.same_dtype(op, "v_TGD", v_TGD, "k_TGD", k_TGD.dtype)
    _check_cache(op, "k_TGD", k_TGD.dtype, k_cache_BGSD, v_cache_BGSD, k_scale_BGS, v_scale_BGS)
    _, G, _, D = k_cache_BGSD.shape
    if k_TGD.dim() != 3 or k_TGD.shape[1:] != (G, D):
        check.wrong_shape(op, "k_TGD", check.shape_of(k_TGD), f"[T, {G}, {D}], as the cache has G and D")
    if v_TGD.shape != k_TGD.shape:
        check.wrong_shape(op, "v_TGD", check.shape_of(v_TGD), f"k's {check.shape_of(k_TGD)}")
    check.exact_dtype(op, "slot_mapping", slot_mapping, torch.int64)
    if slot_mapping.shape != k_TGD.shape[:1]:
        check.wrong_shape(op, "slot_mapping", check.shape_of(slot_mapping), f"[{k_TGD.shape[0]}], one a token")


def check_copy_kv_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    op = "copy_kv_blocks"
    check.one_device(op, ("src", "pairs"), src, pairs)
    check.one_device(op, ("dst",), dst)
    check.same_dtype(op, "dst", dst, "src", src.dtype)
    if src.dim() == 0:
        check.wrong_shape(op, "src", check.shape_of(src), "[B, ...]")
    if dst.dim() == 0 or dst.shape[1:] != src.shape[1:]:
        check.wrong_shape(op, "dst", check.shape_of(dst), f"[B', ...] with src's block shape {check.shape_of(src)[1:]}")
    for argument, tensor in (("src", src), ("dst", dst)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {argument} has strides {tensor.stride()}, expected a contiguous tensor.")
    check.exact_dtype(op, "pairs", pairs, torch.int64)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        check.wrong_shape(op, "pairs", check.shape_of(pairs), "[n, 2]: block of src, block of dst")


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
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
) -> None:
    op = "paged_attention"
    check.one_device(
        op,
        ("q_THD", "k_cache_BGSD", "v_cache_BGSD", "block_tables", "query_start", "seq_lens", "sinks_H", "k_scale_BGS", "v_scale_BGS"),
        q_THD, k_cache_BGSD, v_cache_BGSD, block_tables, query_start, seq_lens, sinks_H, k_scale_BGS, v_scale_BGS,
    )  # fmt: skip
    check.floating(op, "q_THD", q_THD)
    _check_cache(op, "q_THD", q_THD.dtype, k_cache_BGSD, v_cache_BGSD, k_scale_BGS, v_scale_BGS)
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
    if window is not None and (window < 1 or not causal):
        check.wrong_value(op, "window", window, "1 or more, with causal=True")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        check.wrong_value(op, "softcap", softcap, "a positive number")
    if sinks_H is not None:
        check.exact_dtype(op, "sinks_H", sinks_H, torch.float32)
        if sinks_H.shape != q_THD.shape[1:2]:
            check.wrong_shape(op, "sinks_H", check.shape_of(sinks_H), f"[{q_THD.shape[1]}], one a query head")


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
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    k_scale_BGS: Tensor | None,
    v_scale_BGS: Tensor | None,
) -> Tensor:
    check_paged_attention(
        q_THD, k_cache_BGSD, v_cache_BGSD, block_tables, query_start, seq_lens, max_query_len, max_seq_len, scale, causal,
        window, softcap, sinks_H, k_scale_BGS, v_scale_BGS,
    )  # fmt: skip
    return q_THD.new_empty(q_THD.shape)


SCALES: dict[str, Any] = {"k_scale_BGS": None, "v_scale_BGS": None}

RECORDS = (
    OpRecord(
        name="write_kv",
        family="attention",
        check=check_write_kv,
        fake=check_write_kv,
        operands={
            "k_TGD": Operand(check.FLOATS, "T, G, D"),
            "v_TGD": Operand(("k_TGD",), "T, G, D"),
            "k_cache_BGSD": Operand(("k_TGD", *CODE_DTYPES), "B, G, S, D"),
            "v_cache_BGSD": Operand(("k_cache_BGSD",), "B, G, S, D"),
            "slot_mapping": Operand((torch.int64,), "T"),
            **dict.fromkeys(SCALES, Operand((torch.float32,), "B, G, S")),
        },
        samples=samples.write_kv,
        mutates=("k_cache_BGSD", "v_cache_BGSD", "k_scale_BGS", "v_scale_BGS"),
        neutral=SCALES,
    ),
    OpRecord(
        name="paged_attention",
        family="attention",
        check=check_paged_attention,
        fake=fake_paged_attention,
        operands={
            "q_THD": Operand(check.FLOATS, "T, H, D"),
            "k_cache_BGSD": Operand(("q_THD", *CODE_DTYPES), "B, G, S, D"),
            "v_cache_BGSD": Operand(("k_cache_BGSD",), "B, G, S, D"),
            "block_tables": Operand((torch.int32,), "R, M"),
            "query_start": Operand((torch.int32,), "R + 1"),
            "seq_lens": Operand((torch.int32,), "R"),
            "sinks_H": Operand((torch.float32,), "H"),
            **dict.fromkeys(SCALES, Operand((torch.float32,), "B, G, S")),
        },
        outputs={"output": Operand(("q_THD",), "T, H, D")},
        samples=samples.paged_attention,
        bound=bounds.paged_attention,
        neutral=SCALES | {"window": None, "softcap": None, "sinks_H": None},
    ),
    OpRecord(
        name="copy_kv_blocks",
        family="attention",
        check=check_copy_kv_blocks,
        fake=check_copy_kv_blocks,
        operands={
            "src": Operand((), "B, ..."),
            "dst": Operand(("src",), "B', ..."),
            "pairs": Operand((torch.int64,), "n, 2"),
        },
        samples=samples.copy_kv_blocks,
        mutates=("dst",),
    ),
)
