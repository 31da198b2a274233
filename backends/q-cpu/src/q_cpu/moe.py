"""Mixtures of experts. Contracts: :mod:`q_core.ops.moe`."""

from __future__ import annotations

import torch
from torch import Tensor

from q_core.backend import impl
from q_cpu.runtime import native
from q_cpu.support import decline_dtype

MOST_EXPERTS = 1024


def _accepts_logits(logits_TE: Tensor) -> str | None:
    E = logits_TE.shape[1]
    too_many = f"{E} experts, at most {MOST_EXPERTS}" if E > MOST_EXPERTS else None
    return decline_dtype("logits_TE", logits_TE.dtype) or too_many


def _accepts_activations(x_TK: Tensor) -> str | None:
    return decline_dtype("x_TK", x_TK.dtype)


@impl(accepts=_accepts_logits)
def route_topk(logits_TE: Tensor, k: int, renormalize: bool, scoring: str) -> tuple[Tensor, Tensor]:
    """Choose the k experts of each token, and weigh them."""
    T, E = logits_TE.shape
    weights = torch.empty(T, k, dtype=torch.float32)
    ids = torch.empty(T, k, dtype=torch.int32)
    native.route_topk(logits_TE.contiguous(), T, E, k, scoring == "sigmoid", renormalize, weights, ids)
    return weights, ids


@impl(accepts=_accepts_activations)
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
    """Run tokens through their experts: each expert's weights are read once for all of its tokens."""
    T, K = x_TK.shape
    out = torch.empty(T, K, dtype=x_TK.dtype)
    native.fused_moe(
        x_TK.contiguous(), _bytes(w13), _bytes(w2), topk_weights.contiguous(), topk_ids.contiguous(), format,
        T, K, intermediate_size, w13.shape[0], topk_ids.shape[1],
        None if w13_scale is None else w13_scale.contiguous(), None if w2_scale is None else w2_scale.contiguous(), blocksize, out,
    )  # fmt: skip
    return out


def _bytes(weight: Tensor) -> Tensor:
    """Contiguous; float8 as the bytes that it consists of."""
    weight = weight.contiguous()
    return weight.view(torch.uint8) if weight.dtype is torch.float8_e4m3fn else weight
