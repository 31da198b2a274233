"""Attention over the paged cache, beside torch's attention over keys and values that lie contiguous already."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Target, Work
from benchmarks.inputs import normal
from q_core import ops

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 32, 8, 128, 16
DTYPE = torch.bfloat16


def cases() -> Iterator[Case]:
    for requests, length in ((1, 65536), (8, 8192), (64, 1024)):
        yield _decode(requests, length)
    yield _prefill(2048)
    yield _write(4096)


def _decode(requests: int, length: int) -> Case:
    """One query a request; keys and values are 268 MB in all."""
    blocks = requests * length // SLOTS
    k, v = (normal(requests, KV_HEADS, length, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    caches = [
        t.view(requests, KV_HEADS, length // SLOTS, SLOTS, HEAD_DIM).transpose(1, 2).flatten(0, 1).contiguous() for t in (k, v)
    ]
    tables = torch.arange(blocks, dtype=torch.int32).view(requests, -1)
    q = normal(requests, HEADS, HEAD_DIM, dtype=DTYPE)
    starts = torch.arange(requests + 1, dtype=torch.int32)
    lengths = torch.full((requests,), length, dtype=torch.int32)
    return Case(
        "paged_attention [decode]", f"{requests} × {length}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}", "bfloat16",
        lambda i: ops.paged_attention(q, *caches, tables, starts, lengths, max_query_len=1, max_seq_len=length),
        {"torch SDPA, gathered": lambda i: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)},
        target=Target(fraction=0.75, ratio=1.5), work=Work("read", k.nbytes + v.nbytes),
    )  # fmt: skip


def _prefill(length: int) -> Case:
    blocks = length // SLOTS
    k, v = (normal(1, KV_HEADS, length, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    caches = [t.view(KV_HEADS, blocks, SLOTS, HEAD_DIM).transpose(0, 1).contiguous() for t in (k, v)]
    tables = torch.arange(blocks, dtype=torch.int32).view(1, -1)
    q = normal(length, HEADS, HEAD_DIM, dtype=DTYPE)
    theirs = q.transpose(0, 1).unsqueeze(0).contiguous()
    starts = torch.tensor([0, length], dtype=torch.int32)
    lengths = torch.tensor([length], dtype=torch.int32)
    return Case(
        "paged_attention [prefill]", f"{length}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}", "bfloat16",
        lambda i: ops.paged_attention(q, *caches, tables, starts, lengths, max_query_len=length, max_seq_len=length),
        {"torch SDPA": lambda i: F.scaled_dot_product_attention(theirs, k, v, is_causal=True, enable_gqa=True)},
        target=Target(ratio=0.9),
    )  # fmt: skip


def _write(tokens: int) -> Case:
    blocks = tokens // SLOTS
    caches = [torch.zeros(blocks, KV_HEADS, SLOTS, HEAD_DIM, dtype=DTYPE) for _ in range(2)]
    k, v = (normal(tokens, KV_HEADS, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    slots = torch.arange(tokens)
    where = slots // SLOTS, slice(None), slots % SLOTS

    def indexed(_: int) -> None:
        caches[0][where], caches[1][where] = k, v

    return Case(
        "write_kv", f"{tokens} × {KV_HEADS} heads of {HEAD_DIM}", "bfloat16",
        lambda i: ops.write_kv(k, v, *caches, slots), {"torch, indexed": indexed}, work=Work("copy", 4 * k.nbytes),
    )  # fmt: skip
