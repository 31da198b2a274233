"""Runs the model on a step that the scheduler chose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q_serve.core.scheduler import ScheduledRequest
from q_serve.models.config import ModelConfig
from q_serve.models.layers import KVCache, RopeTables, Step
from q_serve.models.llama import LlamaForCausalLM
from q_serve.models.rope import rope_tables
from q_serve.worker.sampler import Draw, sample


def kv_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one cache block over all layers, keys and values together."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize


class ModelRunner:
    """Owns the KV cache, and turns scheduled requests into tensors and tensors into tokens.

    Args:
        model: loaded, on its device.
        num_blocks: cache blocks.
        block_size: tokens a block.
        max_model_len: the longest sequence that will come.
        dtype: the model's, and so the cache's.
        device: the model's.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.device = device
        config = model.config
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self.caches = [
            KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_layers)
        ]
        cos, sin = rope_tables(config.rope, config.head_dim, max_model_len)
        self.rope = RopeTables(cos.to(device), sin.to(device))

    @torch.inference_mode()
    def execute(self, batch: Sequence[ScheduledRequest]) -> list[int | None]:
        """Compute a step.

        Args:
            batch: one or more scheduled requests; running one again is harmless, since it writes the same keys and values.

        Returns:
            For each that samples, its token, or ``None`` if its logits are not finite; ``None`` for the others.
        """
        input_ids, step = self._inputs(batch)
        hidden_TK = self.model(input_ids, step, self.rope, self.caches)
        sampling = [row for row, scheduled in enumerate(batch) if scheduled.samples]
        tokens: list[int | None] = [None] * len(batch)
        if sampling:
            last = step.query_start[1:][sampling] - 1
            draws = [Draw(batch[row].request.params, batch[row].request.num_output_tokens) for row in sampling]
            for row, token in zip(sampling, sample(self.model.logits(hidden_TK[last]), draws), strict=True):
                tokens[row] = token
        return tokens

    def _inputs(self, batch: Sequence[ScheduledRequest]) -> tuple[Tensor, Step]:
        input_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_start = [0]
        widest = max(len(scheduled.request.blocks) for scheduled in batch)
        tables = []
        for scheduled in batch:
            request, span = scheduled.request, range(scheduled.start, scheduled.end)
            input_ids += request.tokens[scheduled.start : scheduled.end]
            positions += span
            slots += [
                request.blocks[position // self.block_size] * self.block_size + position % self.block_size for position in span
            ]
            query_start.append(len(input_ids))
            tables.append(request.blocks + [0] * (widest - len(request.blocks)))
        step = Step(
            positions=self._tensor(positions, torch.int64),
            slot_mapping=self._tensor(slots, torch.int64),
            block_tables=self._tensor(tables, torch.int32),
            query_start=self._tensor(query_start, torch.int32),
            seq_lens=self._tensor([scheduled.end for scheduled in batch], torch.int32),
            max_query_len=max(scheduled.end - scheduled.start for scheduled in batch),
            max_seq_len=max(scheduled.end for scheduled in batch),
        )
        return self._tensor(input_ids, torch.int64), step

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)
