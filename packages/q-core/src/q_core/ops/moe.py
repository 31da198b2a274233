"""Mixture of experts: routing, and the experts themselves.

Under autocast ``x`` and dense experts are cast; codes, scales and the router's weights are not.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from q_core import hookspecs
from q_core.dispatch import bound
from q_core.experts import ExpertFormat
from q_core.specs import moe as spec

_route_topk = bound(hookspecs.route_topk)
_fused_moe = bound(hookspecs.fused_moe)


def route_topk(
    logits_TE: Tensor, *, k: int, renormalize: bool = True, scoring: Literal["softmax", "sigmoid"] = "softmax"
) -> tuple[Tensor, Tensor]:
    """Choose the k experts of each token.

    Those with the largest logits are chosen, in descending order; of equal ones the lower id first. A token with a NaN among its logits
    gets NaN weights and some valid ids.

    Args:
        logits_TE: float32, bfloat16 or float16 [T, E].
        k: experts a token, 1…E.
        renormalize: divide the weights of a token by their sum.
        scoring: what an expert's weight is: "softmax" over all experts, or "sigmoid" of its own logit.

    Returns:
        weights: float32 [T, k].
        ids: int32 [T, k].
    """
    spec.check_route_topk(logits_TE, k, renormalize, scoring)
    return _route_topk(logits_TE, k, renormalize, scoring)


def fused_moe(
    x_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    format: ExpertFormat = "dense",
    intermediate_size: int | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    blocksize: int = 64,
) -> Tensor:
    """Run each token through its experts and sum by weight: ``Σ_j w_j · down_j(silu(gate_j(x)) · up_j(x))``.

    Sums are float32 or better; the activations between the two products may be rounded to x's dtype, the result is rounded once.

    Args:
        x_TK: float32, bfloat16 or float16 [T, K].
        w13: gate and up of each expert, one over the other, [E, 2N, K] as the format holds it:
            "dense" x's dtype [E, 2N, K]; "int8" int8 and "fp8" float8_e4m3fn [E, 2N, K]; a 4-bit type uint8 [E, ceil(2N * K / 2)], each
            expert packed by itself as :func:`q_core.ops.quantize_4bit` does.
        w2: down of each expert, [E, K, N], likewise: as it is, or int8, or float8_e4m3fn, or a 4-bit type uint8 [E, ceil(K * N / 2)].
        topk_weights: float32 [T, k].
        topk_ids: int32 [T, k], 0…E-1; a negative one is skipped (the expert lives elsewhere).
        format: how the experts are held.
        intermediate_size: N; may be left out where w2's shape shows it ("dense", "int8", "fp8").
        w13_scale, w2_scale: float32: none for "dense"; the rows' absmax [E, 2N] and [E, K] for "int8" (over 127) and "fp8" (over 448); the
            blocks' absmax [E, ceil(2N * K / blocksize)] and [E, ceil(K * N / blocksize)] for a 4-bit type.
        blocksize: elements a block of a 4-bit type.

    Returns:
        Tensor [T, K] of x's dtype, contiguous. The gradient goes to x and topk_weights.
    """
    if intermediate_size is None:
        intermediate_size = spec.intermediate_size_of(w2, format)
    arguments = x_TK, w13, w2, topk_weights, topk_ids, format, intermediate_size, w13_scale, w2_scale, blocksize
    spec.check_fused_moe(*arguments)
    return _fused_moe(*arguments)
