"""Reference of the moe family, with shapes that depend on no value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import impl
from q_core.experts import FOUR_BIT_FORMATS
from q_core.reference.quantize import dequantize_4bit
from q_core.reference.widen import widen

PEAKS = {"int8": 127.0, "fp8": 448.0}


@impl
def route_topk(logits_TE: Tensor, k: int, renormalize: bool, scoring: str) -> tuple[Tensor, Tensor]:
    wide = widen(logits_TE)
    # Stable, so that of equal logits the lower id comes first.
    ids = wide.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = torch.where(wide.isnan().any(-1, keepdim=True), torch.nan, weights)
    return weights.to(torch.float64 if wide.dtype is torch.float64 else torch.float32), ids.to(torch.int32).contiguous()


def decode_expert(weight: Tensor, scale: Tensor | None, index: int, shape: tuple[int, int], format: str, blocksize: int) -> Tensor:
    """The weight of one expert, dense and wide."""
    if scale is None:
        return widen(weight[index])
    if format in FOUR_BIT_FORMATS:
        return dequantize_4bit(weight[index], scale[index].float(), blocksize, format, shape, torch.float32)
    return weight[index].float() * (scale[index] / PEAKS[format]).unsqueeze(-1)


@impl
def fused_moe(
    x_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    format: str,
    intermediate_size: int,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    blocksize: int,
) -> Tensor:
    x = widen(x_TK)
    K, N = x.shape[1], intermediate_size
    total = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for expert in range(w13.shape[0]):
        chosen = topk_ids == expert
        # Every expert sees every token: which of them are its own is known on the device alone.
        gate_up = F.linear(x, decode_expert(w13, w13_scale, expert, (2 * N, K), format, blocksize).to(x.dtype))
        gate, up = gate_up.chunk(2, -1)
        result = F.linear(F.silu(gate) * up, decode_expert(w2, w2_scale, expert, (K, N), format, blocksize).to(x.dtype))
        weight = torch.where(chosen, topk_weights, 0.0).sum(-1, keepdim=True).to(x.dtype)
        total += torch.where(chosen.any(-1, keepdim=True), weight * result, 0.0)
    return total.to(x_TK.dtype)
