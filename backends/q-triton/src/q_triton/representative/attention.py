"""Calls of the attention family: caches of half a gigabyte, prompts, and batches of both."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from q_triton.representative.values import BF16, F32, FP8, INT8, TITLES, Calls, Values

S = 16
"""Slots of a block, as q-serve has them."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a model."""

    H: int
    G: int
    D: int


LLAMA, QWEN, GPT_OSS, GEMMA, PHI = Heads(32, 8, 128), Heads(64, 4, 128), Heads(64, 8, 64), Heads(16, 8, 256), Heads(32, 32, 96)


def _cache(values: Values, B: int, heads: Heads, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A cache [B, G, S, D], and its scales if it holds codes."""
    shape = (B, heads.G, S, heads.D)
    if dtype in (INT8, FP8):
        return values.codes(*shape, dtype=dtype), values.uniform(*shape[:-1])
    return values.normal(*shape, dtype=dtype), None


def write_kv(values: Values) -> Calls:
    for T, heads, dtype, cache in (
        (64, LLAMA, BF16, BF16), (4096, LLAMA, BF16, INT8), (4096, LLAMA, BF16, FP8), (4096, GPT_OSS, BF16, BF16),
        (64, GEMMA, BF16, INT8), (64, PHI, F32, F32),
    ):  # fmt: skip
        B = 8192 // S
        (k_cache, k_scale), (v_cache, v_scale) = (_cache(values, B, heads, cache) for _ in "kv")
        yield f"{T} tokens, {heads.G} heads of {heads.D}, {TITLES[dtype]} to {TITLES[cache]}", {
            "k_TGD": values.normal(T, heads.G, heads.D, dtype=dtype), "v_TGD": values.normal(T, heads.G, heads.D, dtype=dtype),
            "k_cache_BGSD": k_cache, "v_cache_BGSD": v_cache, "slot_mapping": values.permutation(B * S, dtype=torch.int64)[:T],
            "k_scale_BGS": k_scale, "v_scale_BGS": v_scale,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests of one query length and one sequence length."""

    R: int
    queries: int
    keys: int


DECODE, LONG, PREFILL, CHUNK = Batch(64, 1, 2048), Batch(1, 1, 131072), Batch(4, 2048, 2048), Batch(8, 256, 4096)
SINKS_AND_WINDOW: dict[str, Any] = {"window": 128, "sinks": True}


def paged_attention(values: Values) -> Calls:
    yield _attend(values, DECODE, LLAMA)
    yield _attend(values, LONG, LLAMA)
    yield _attend(values, DECODE, QWEN)
    yield _attend(values, DECODE, PHI)
    yield _attend(values, DECODE, GPT_OSS, **SINKS_AND_WINDOW)
    yield _attend(values, DECODE, GEMMA, softcap=50.0)
    yield _attend(values, DECODE, LLAMA, cache=INT8)
    yield _attend(values, DECODE, LLAMA, cache=FP8)
    yield _attend(values, DECODE, GPT_OSS, cache=INT8)
    yield _attend(values, DECODE, GEMMA, cache=INT8)
    yield _attend(values, DECODE, GPT_OSS, dtype=F32)
    yield _attend(values, DECODE, LLAMA, dtype=F32)
    yield _attend(values, DECODE, GEMMA, dtype=F32)
    yield _attend(values, PREFILL, LLAMA)
    yield _attend(values, PREFILL, LLAMA, causal=False)
    yield _attend(values, PREFILL, PHI)
    yield _attend(values, PREFILL, GPT_OSS, **SINKS_AND_WINDOW)
    yield _attend(values, PREFILL, GEMMA, softcap=50.0)
    yield _attend(values, PREFILL, LLAMA, cache=INT8)
    yield _attend(values, PREFILL, LLAMA, cache=FP8)
    yield _attend(values, PREFILL, GPT_OSS, cache=INT8)
    yield _attend(values, PREFILL, GEMMA, cache=INT8)
    yield _attend(values, PREFILL, GPT_OSS, dtype=F32)
    yield _attend(values, PREFILL, LLAMA, dtype=F32)
    yield _attend(values, PREFILL, GEMMA, dtype=F32)
    yield _attend(values, CHUNK, LLAMA)


def _attend(
    values: Values, batch: Batch, heads: Heads, *, dtype: torch.dtype = BF16, cache: torch.dtype | None = None, **settings: Any
) -> tuple[str, dict[str, Any]]:
    blocks = batch.keys // S  # of a request
    (k_cache, k_scale), (v_cache, v_scale) = (_cache(values, batch.R * blocks, heads, cache or dtype) for _ in "kv")
    title = f"{batch.R} x {batch.queries} queries of {batch.keys} keys, {heads.H} / {heads.G} heads of {heads.D}, {TITLES[dtype]}"
    if cache is not None:
        title += f", {TITLES[cache]} cache"
    title += "".join(f", {name}={value}" for name, value in settings.items())
    sinks = settings.pop("sinks", False)
    return title, {
        "q_THD": values.normal(batch.R * batch.queries, heads.H, heads.D, dtype=dtype),
        "k_cache_BGSD": k_cache, "v_cache_BGSD": v_cache,
        "block_tables": values.permutation(batch.R * blocks, dtype=torch.int32).view(batch.R, blocks),
        "query_start": values.given(accumulate([batch.queries] * batch.R, initial=0), dtype=torch.int32),
        "seq_lens": values.given([batch.keys] * batch.R, dtype=torch.int32),
        "max_query_len": batch.queries, "max_seq_len": batch.keys, "scale": heads.D**-0.5,
        "causal": True, "window": None, "softcap": None, "sinks_H": values.normal(heads.H, dtype=F32) if sinks else None,
        "k_scale_BGS": k_scale, "v_scale_BGS": v_scale,
    } | settings  # fmt: skip


def copy_kv_blocks(values: Values) -> Calls:
    B, n = 1024, 64
    order = values.permutation(B, dtype=torch.int64)
    pairs = order[: 2 * n].view(n, 2)
    for dtype in (BF16, FP8):
        (src, scale), (dst, _) = (_cache(values, B, LLAMA, dtype) for _ in range(2))
        yield f"{n} blocks, {TITLES[dtype]}", {"src": src, "dst": dst, "pairs": pairs}
        yield f"{n} blocks within one cache, {TITLES[dtype]}", {"src": src, "dst": src, "pairs": pairs}
        if scale is not None:
            yield f"scales of {n} blocks", {"src": scale, "dst": torch.empty_like(scale), "pairs": pairs}
