"""Attention over the paged cache, beside torch's attention over keys and values that lie contiguous, or are gathered first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Target, Work
from benchmarks.gpu_cases.sizes import Sizes, agrees
from q_core import ops
from q_core.reference import attention as reference

SLOTS = 16
DECODE, DECODE_STRETCH = Target(fraction=0.75), Target(fraction=0.85)
PREFILL, PREFILL_STRETCH = Target(rate=430e12), Target(rate=520e12)
CHECKED = 64
"""Queries of a request, its last, that are compared with float64's."""

FORMATS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def cases(sizes: Sizes) -> Iterator[Case]:
    for name, dtype in FORMATS.items():
        for requests in sizes.requests:
            yield _decode(sizes, requests, sizes.cached // requests, name, dtype)
    for requests, tokens in sizes.prompts:
        yield _prefill(sizes, requests, tokens)
    yield _write(sizes)
    yield _copy(sizes)


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of requests of one length: contiguous [R, G, L, D], and as the paged cache has them, blocks in random order.

    Attributes:
        k, v: contiguous.
        blocks: keys' and values' blocks [B, G, S, D], in the cache's dtype.
        scales: of a quantized cache.
        tables: int32 [R, M].
    """

    k: Tensor
    v: Tensor
    blocks: list[Tensor]
    scales: dict[str, Tensor]
    tables: Tensor

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in (*self.blocks, *self.scales.values()))


def _cache(sizes: Sizes, requests: int, length: int, dtype: torch.dtype) -> Cache:
    _, G, D = sizes.heads
    M = -(-length // SLOTS)
    order = torch.randperm(requests * M, device=sizes.device)
    contiguous, blocks, scales = [], [], {}
    for name in "kv":
        dense = sizes.normal(requests, G, M * SLOTS, D)
        held, scale = (dense, None) if dtype is torch.bfloat16 else reference.encode(dense, dtype)
        paged = torch.empty(requests * M, G, SLOTS, D, dtype=dtype, device=sizes.device)
        _bytes(paged)[order] = _bytes(held).view(requests, G, M, SLOTS, -1).transpose(1, 2).flatten(0, 1)
        blocks.append(paged)
        if scale is not None:
            scales[f"{name}_scale_BGS"] = torch.empty(requests * M, G, SLOTS, device=sizes.device)
            scales[f"{name}_scale_BGS"][order] = scale.view(requests, G, M, SLOTS).transpose(1, 2).flatten(0, 1)
        contiguous.append(reference.decode(held, scale).to(torch.bfloat16)[:, :, :length])
    return Cache(*contiguous, blocks, scales, order.view(requests, M).to(torch.int32))


def _bytes(tensor: Tensor) -> Tensor:
    """float8 has no indexing of its own."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _int32(sizes: Sizes, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=sizes.device)


def _exact(q_RHQD: Tensor, cache: Cache) -> Tensor:
    """Attention of each request's last queries, in float64: [R, Q, H, D]."""
    R, H, Q, D = q_RHQD.shape
    L = cache.k.shape[2]
    groups = H // cache.k.shape[1]
    hidden = torch.ones(Q, L, dtype=torch.bool, device=q_RHQD.device).triu(L - Q + 1)
    out = torch.empty(R, Q, H, D, dtype=torch.float64, device=q_RHQD.device)
    for request in range(R):
        for head in range(H):
            k, v = (held[request, head // groups].double() for held in (cache.k, cache.v))
            scores = (q_RHQD[request, head].double() @ k.T * D**-0.5).masked_fill(hidden, float("-inf"))
            out[request, :, head] = scores.softmax(-1) @ v
    return out


def _decode(sizes: Sizes, requests: int, length: int, name: str, dtype: torch.dtype) -> Case:
    """One query a request."""
    H, G, D = sizes.heads
    cache = _cache(sizes, requests, length, dtype)
    q = sizes.normal(requests, H, D)
    starts, lengths = _int32(sizes, list(range(requests + 1))), _int32(sizes, [length] * requests)

    def ours(_: int) -> Tensor:
        return ops.paged_attention(
            q, *cache.blocks, cache.tables, starts, lengths, max_query_len=1, max_seq_len=length, **cache.scales
        )

    dense = dtype is torch.bfloat16
    return Case(
        f"paged_attention [decode, {name}]", f"{requests} × {length}, {H}/{G} heads of {D}", "bfloat16", ours,
        {"torch SDPA, gathered": lambda _: F.scaled_dot_product_attention(q[:, :, None], cache.k, cache.v, enable_gqa=True)},
        target=DECODE if dense else Target(), stretch=DECODE_STRETCH if dense else Target(), work=Work("copy", cache.nbytes),
        check=agrees(lambda: ours(0), lambda: _exact(q[:, :, None], cache)[:, 0], torch.bfloat16),
    )  # fmt: skip


def _prefill(sizes: Sizes, requests: int, length: int) -> Case:
    H, G, D = sizes.heads
    cache = _cache(sizes, requests, length, torch.bfloat16)
    q = sizes.normal(requests * length, H, D)
    theirs = q.view(requests, length, H, D).transpose(1, 2).contiguous()
    starts, lengths = _int32(sizes, [r * length for r in range(requests + 1)]), _int32(sizes, [length] * requests)
    checked = min(CHECKED, length)

    def ours(_: int) -> Tensor:
        return ops.paged_attention(q, *cache.blocks, cache.tables, starts, lengths, max_query_len=length, max_seq_len=length)

    def gathered_first(_: int) -> Tensor:
        tables = cache.tables.long()
        k, v = (held[tables].transpose(1, 2).flatten(2, 3)[:, :, :length] for held in cache.blocks)
        return F.scaled_dot_product_attention(theirs, k, v, is_causal=True, enable_gqa=True)

    return Case(
        "paged_attention [prefill]", f"{requests} × {length}, {H}/{G} heads of {D}", "bfloat16", ours,
        {
            "torch SDPA, gathered": lambda _: F.scaled_dot_product_attention(
                theirs, cache.k, cache.v, is_causal=True, enable_gqa=True
            ),
            "gathering, then torch SDPA": gathered_first,
        },
        # Half of the scores, products with keys and with values.
        target=PREFILL, stretch=PREFILL_STRETCH, work=Work("matrix", 2 * requests * length * (length + 1) * H * D),
        check=agrees(
            lambda: ours(0).view(requests, length, H, D)[:, -checked:], lambda: _exact(theirs[:, :, -checked:], cache), torch.bfloat16
        ),
    )  # fmt: skip


def _write(sizes: Sizes) -> Case:
    _, G, D = sizes.heads
    tokens = sizes.cached // 4
    blocks = -(-tokens // SLOTS)
    caches = [torch.zeros(blocks, G, SLOTS, D, dtype=torch.bfloat16, device=sizes.device) for _ in range(2)]
    k, v = (sizes.normal(tokens, G, D) for _ in range(2))
    slots = torch.randperm(blocks * SLOTS, device=sizes.device)[:tokens]
    where = slots // SLOTS, slice(None), slots % SLOTS

    def indexed(_: int) -> None:
        caches[0][where], caches[1][where] = k, v

    def written() -> tuple[Tensor, Tensor]:
        ops.write_kv(k, v, *caches, slots)
        return caches[0][where], caches[1][where]

    return Case(
        "write_kv", f"{tokens} × {G} heads of {D}", "bfloat16", lambda _: ops.write_kv(k, v, *caches, slots),
        {"torch, indexed": indexed}, work=Work("copy", 4 * k.nbytes), check=agrees(written, lambda: (k, v), torch.bfloat16),
    )  # fmt: skip


def _copy(sizes: Sizes) -> Case:
    _, G, D = sizes.heads
    blocks = sizes.cached // SLOTS
    src, dst = (sizes.normal(blocks, G, SLOTS, D) for _ in range(2))
    order = torch.randperm(blocks, device=sizes.device)
    pairs = torch.stack((order, order.flip(0)), 1)

    def copied() -> Tensor:
        ops.copy_kv_blocks(src, dst, pairs)
        return dst[pairs[:, 1]]

    return Case(
        "copy_kv_blocks", f"{blocks} blocks of {G} × {SLOTS} × {D}", "bfloat16", lambda _: ops.copy_kv_blocks(src, dst, pairs),
        {"torch, indexed": lambda _: dst.index_copy_(0, pairs[:, 1], src[pairs[:, 0]])},
        work=Work("copy", 2 * src.nbytes), check=agrees(copied, lambda: src[pairs[:, 0]], torch.bfloat16),
    )  # fmt: skip
