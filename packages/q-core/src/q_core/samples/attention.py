"""Sample calls of the attention family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

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


def write_kv(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for tokens, G, D, S in ((5, 2, 16, 4), (1, 1, 5, 3), (0, 2, 8, 4)):
        slots = make.permutation(6 * S)[:tokens]
        yield {
            "k_TGD": make.normal(tokens, G, D, dtype=dtype), "v_TGD": make.normal(tokens, G, D, dtype=dtype),
            "k_cache_BGSD": make.normal(6, G, S, D, dtype=dtype), "v_cache_BGSD": make.normal(6, G, S, D, dtype=dtype),
            "slot_mapping": torch.where(torch.arange(tokens) == 2, -1, slots),
        }  # fmt: skip


def paged_attention(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for causal in (True, False):
        for batch in BATCHES:
            longest = max(batch.seq_lens)
            width = -(-longest // batch.S)
            R = len(batch.seq_lens)
            query_start = torch.tensor((0, *batch.query_lens)).cumsum(0).to(torch.int32)
            blocks = R * width + 2
            yield {
                "q_THD": make.normal(int(query_start[-1]), batch.H, batch.D, dtype=dtype),
                "k_cache_BGSD": make.normal(blocks, batch.G, batch.S, batch.D, dtype=dtype),
                "v_cache_BGSD": make.normal(blocks, batch.G, batch.S, batch.D, dtype=dtype),
                "block_tables": make.permutation(blocks)[: R * width].view(R, width).to(torch.int32),
                "query_start": query_start,
                "seq_lens": torch.tensor(batch.seq_lens, dtype=torch.int32),
                "max_query_len": max(batch.query_lens), "max_seq_len": longest,
                "scale": batch.D**-0.5, "causal": causal,
            }  # fmt: skip
