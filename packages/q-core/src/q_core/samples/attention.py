"""Sample calls of the attention family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q_core.samples.make import Make


@dataclass(frozen=True, slots=True)
class Batch:
    """Queries and sequence lengths of a batch, with the model's head counts."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    H: int = 4
    G: int = 2
    D: int = 16
    S: int = 4


BATCHES = (
    Batch((1, 1, 1), (5, 1, 17)),
    Batch((6, 1, 3), (6, 9, 11)),
    Batch((9,), (9,), H=3, G=3, D=8, S=16),
    Batch((1, 0, 2), (4, 3, 8), H=8, G=1, D=5),
    Batch((0,), (4,)),
)


WRITES = ((5, 2, 16, 4), (1, 1, 5, 3), (0, 2, 8, 4))
"""Tokens, G, D, S."""


def draw_batch(make: Make) -> Batch:
    G, R = make.size(1, 3), make.size(1, 4)
    query_lens = make.shape(*[9] * R)
    seq_lens = tuple(length + extra for length, extra in zip(query_lens, make.shape(*[14] * R), strict=True))
    return Batch(query_lens, seq_lens, H=G * make.size(1, 3), G=G, D=make.size(1, 20), S=make.size(1, 9))


def draw_write(make: Make) -> tuple[int, int, int, int]:
    S = make.size(1, 9)
    return make.size(0, 6 * S), make.size(1, 3), make.size(1, 20), S


CODE_DTYPES = (None, torch.int8, torch.float8_e4m3fn)
"""Dtypes of a cache; ``None`` for that of its keys and values."""

HALF_WAY = {
    torch.int8: (254.0, *range(-253, 254, 2)),
    torch.float8_e4m3fn: (448.0, *(code + 16 for code in range(256, 448, 32)), *(code + 8 for code in range(128, 256, 16))),
}
"""An absmax, and values half-way between two codes, where the last bit of peak / absmax decides."""


def _cache(make: Make, *shape: int, dtype: torch.dtype, codes: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """A cache [B, G, S, D] with content, and its scales if it holds codes."""
    dense = make.normal(*shape, dtype=dtype)
    if codes is None:
        return dense, None
    return (dense.float() * 30).to(codes), make.uniform(*shape[:-1], low=0.5, high=2.0)


def write_kv(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for codes in CODE_DTYPES:
        for tokens, G, D, S in make.cases(WRITES, draw_write):
            slots = make.permutation(6 * S)[:tokens]
            k_cache, k_scale = _cache(make, 6, G, S, D, dtype=dtype, codes=codes)
            v_cache, v_scale = _cache(make, 6, G, S, D, dtype=dtype, codes=codes)
            yield {
                "k_TGD": make.normal(tokens, G, D, dtype=dtype), "v_TGD": make.normal(tokens, G, D, dtype=dtype),
                "k_cache_BGSD": k_cache, "v_cache_BGSD": v_cache,
                "slot_mapping": torch.where(torch.arange(tokens) == 2, -1, slots),
                "k_scale_BGS": k_scale, "v_scale_BGS": v_scale,
            }  # fmt: skip
    for code_dtype, values in HALF_WAY.items():
        tokens, D = 64, len(values)
        new = (torch.arange(1.0, tokens + 1)[:, None] * torch.tensor(values)).to(dtype)[:, None]
        caches = [torch.zeros(tokens // 16, 1, 16, D, dtype=code_dtype) for _ in "kv"]
        scales = [torch.zeros(tokens // 16, 1, 16) for _ in "kv"]
        yield {
            "k_TGD": new, "v_TGD": -new, "k_cache_BGSD": caches[0], "v_cache_BGSD": caches[1],
            "slot_mapping": torch.arange(tokens), "k_scale_BGS": scales[0], "v_scale_BGS": scales[1],
        }  # fmt: skip


def _attention(make: Make, dtype: torch.dtype, batch: Batch, codes: torch.dtype | None = None, **changes: Any) -> dict[str, Any]:
    longest = max(batch.seq_lens)
    width = -(-longest // batch.S)
    R = len(batch.seq_lens)
    query_start = torch.tensor((0, *batch.query_lens)).cumsum(0).to(torch.int32)
    shape = (R * width + 2, batch.G, batch.S, batch.D)
    k_cache, k_scale = _cache(make, *shape, dtype=dtype, codes=codes)
    v_cache, v_scale = _cache(make, *shape, dtype=dtype, codes=codes)
    return {
        "q_THD": make.normal(int(query_start[-1]), batch.H, batch.D, dtype=dtype),
        "k_cache_BGSD": k_cache, "v_cache_BGSD": v_cache,
        "block_tables": make.permutation(shape[0])[: R * width].view(R, width).to(torch.int32),
        "query_start": query_start,
        "seq_lens": torch.tensor(batch.seq_lens, dtype=torch.int32),
        "max_query_len": max(batch.query_lens) + make.option(0, 3),
        "max_seq_len": min(longest + make.option(0, 5), width * batch.S),
        "scale": batch.D**-0.5, "causal": True, "window": None, "softcap": None, "sinks_H": None,
        "k_scale_BGS": k_scale, "v_scale_BGS": v_scale,
    } | changes  # fmt: skip


def _what_is_not_read_is_garbage(call: dict[str, Any]) -> dict[str, Any]:
    """The same call where the cache and the block tables, beyond the sequences, hold what memory may hold."""
    blocks, _, S, _ = call["k_cache_BGSD"].shape
    written = torch.zeros(blocks, S, dtype=torch.bool)
    tables = torch.full_like(call["block_tables"], blocks)
    tables[:, 1::2] = -1
    for row, length in enumerate(call["seq_lens"].tolist()):
        used = -(-length // S)
        tables[row, :used] = call["block_tables"][row, :used]
        for position in range(length):
            written[tables[row, position // S], position % S] = True
    caches = ("k_cache_BGSD", "v_cache_BGSD")
    garbage = {name: call[name].masked_fill(~written[:, None, :, None], float("nan")) for name in caches}
    return call | garbage | {"block_tables": tables}


def paged_attention(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for batch in make.cases(BATCHES, draw_batch):
        yield _attention(make, dtype, batch)
        yield _attention(make, dtype, batch, causal=False)
    for batch in make.cases(BATCHES[1:2], draw_batch):
        for window in (1, 3, 100):
            yield _attention(make, dtype, batch, window=window)
        yield _attention(make, dtype, batch, softcap=0.7)
        yield _attention(make, dtype, batch, scale=0.7)
        yield _what_is_not_read_is_garbage(_attention(make, dtype, batch))
        yield _what_is_not_read_is_garbage(_attention(make, dtype, batch, causal=False))
        yield _attention(make, dtype, batch, sinks_H=make.normal(batch.H, scale=2.0))
        for codes in CODE_DTYPES[1:]:
            yield _attention(make, dtype, batch, codes)
            yield _attention(make, dtype, batch, codes, window=4, softcap=3.0, sinks_H=make.normal(batch.H))


def copy_kv_blocks(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for codes in CODE_DTYPES:
        for B, G, D, S in make.cases(((5, 2, 8, 4),), lambda make: (make.size(1, 6), *draw_write(make)[1:])):
            src, scale = _cache(make, B, G, S, D, dtype=dtype, codes=codes)
            dst, _ = _cache(make, B + 2, G, S, D, dtype=dtype, codes=codes)
            pairs = torch.stack((make.integers(B, low=0, high=B), make.permutation(B + 2)[:B]), 1)
            yield {"src": src, "dst": dst, "pairs": pairs}
            yield {"src": src, "dst": dst.clone(), "pairs": pairs[:0]}
            # Within one cache, each block to the place of the next: all are read before any is written.
            within, order = src.clone(), torch.arange(B)
            yield {"src": within, "dst": within, "pairs": torch.stack((order, order.roll(-1)), 1)}
            if scale is not None:
                order = make.permutation(B)
                yield {"src": scale, "dst": torch.zeros_like(scale), "pairs": torch.stack((order, order.flip(0)), 1)}
