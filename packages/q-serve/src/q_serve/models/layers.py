"""Layers that the families share. All of their arithmetic is ops of q-core.

Modules and their parameters have the names of Hugging Face's checkpoints, so that a checkpoint's keys are the model's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from q_core import ops
from q_serve.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Step:
    """What attention needs to know of a step.

    Attributes:
        positions: int64 [T], position of each token in its sequence.
        slot_mapping: int64 [T], cache slot of each token.
        block_tables: int32 [R, M], cache blocks of each request.
        query_start: int32 [R + 1], first token of each request, and T.
        seq_lens: int32 [R], length of each sequence, this step's tokens included.
        max_query_len, max_seq_len: upper bounds of the requests' tokens in this step and of ``seq_lens``.
    """

    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_start: Tensor
    seq_lens: Tensor
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's keys and values, each [B, G, S, D]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Rotary tables, float32 [P, D / 2], on the model's device."""

    cos: Tensor
    sin: Tensor


class Linear(nn.Linear):
    """A dense linear layer over :func:`q_core.ops.gemm`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        return ops.gemm(input, self.weight, bias=self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm; also of a sum with the residual, in one pass."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TK: Tensor) -> Tensor:
        """Norm of x."""
        return ops.rms_norm(x_TK, self.weight, eps=self.eps)

    def add(self, x_TK: Tensor, residual_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Norm of x + residual, and that sum."""
        return ops.add_rms_norm(x_TK, residual_TK, self.weight, eps=self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions over the paged cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.output_bias)

    def forward(self, x_TK: Tensor, step: Step, rope: RopeTables, cache: KVCache) -> Tensor:
        """Write this step's keys and values, then attend to all of each sequence."""
        T = x_TK.shape[0]
        q_THD = self.q_proj(x_TK).view(T, -1, self.head_dim)
        k_TGD = self.k_proj(x_TK).view(T, -1, self.head_dim)
        v_TGD = self.v_proj(x_TK).view(T, -1, self.head_dim)
        q_THD, k_TGD = ops.rotary_embedding(q_THD, k_TGD, step.positions, rope.cos, rope.sin)
        ops.write_kv(k_TGD, v_TGD, cache.keys, cache.values, step.slot_mapping)
        out_THD = ops.paged_attention(
            q_THD,
            cache.keys,
            cache.values,
            step.block_tables,
            step.query_start,
            step.seq_lens,
            max_query_len=step.max_query_len,
            max_seq_len=step.max_seq_len,
        )
        out: Tensor = self.o_proj(out_THD.view(T, -1))
        return out


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] → [T, K]."""
        out: Tensor = self.down_proj(ops.silu_and_mul(torch.cat((self.gate_proj(x_TK), self.up_proj(x_TK)), dim=-1)))
        return out
