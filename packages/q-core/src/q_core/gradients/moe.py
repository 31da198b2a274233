"""Gradients of the moe family: to logits, activations and the weights of the chosen experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_core.experts import FOUR_BIT_FORMATS
from q_core.record import Gradient
from q_core.reference.moe import decode_expert


def _save_route_topk(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_TE, _, ctx.renormalize, ctx.scoring = arguments
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits_TE, output[1])


def _backward_route_topk(ctx: Any, dweights: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    logits_TE, ids = ctx.saved_tensors
    logits, ids = logits_TE.float(), ids.long()
    scores = logits.softmax(-1) if ctx.scoring == "softmax" else logits.sigmoid()
    chosen = scores.gather(1, ids)
    dchosen = dweights
    if ctx.renormalize:
        total = chosen.sum(-1, keepdim=True)
        dchosen = (dweights - (dweights * chosen).sum(-1, keepdim=True) / total) / total
    dscores = torch.zeros_like(scores).scatter(1, ids, dchosen)
    softmax = ctx.scoring == "softmax"
    dlogits = scores * (dscores - (dscores * scores).sum(-1, keepdim=True)) if softmax else dscores * scores * (1 - scores)
    return dlogits.to(logits_TE.dtype), None, None, None


def _save_fused_moe(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    x_TK, w13, w2, topk_weights, topk_ids, ctx.format, ctx.size, w13_scale, w2_scale, ctx.blocksize = arguments
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError(
            "fused_moe has no gradient to its experts: freeze them (requires_grad_(False)), or train them one by one."
        )
    ctx.save_for_backward(x_TK, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale)


def _backward_fused_moe(ctx: Any, dy_TK: Tensor) -> tuple[Tensor | None, ...]:
    x_TK, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale = ctx.saved_tensors
    x, dy = x_TK.float(), dy_TK.float()
    K, N = x.shape[1], ctx.size
    dx, dweights = torch.zeros_like(x), torch.zeros_like(topk_weights)
    for expert in range(w13.shape[0]):
        chosen = topk_ids == expert
        mine = chosen.any(-1, keepdim=True)
        first = _decode(w13, w13_scale, expert, (2 * N, K), ctx.format, ctx.blocksize)
        second = _decode(w2, w2_scale, expert, (K, N), ctx.format, ctx.blocksize)
        gate, up = (x @ first.T).chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        hidden = gate * sigmoid * up
        dhidden = dy @ second
        dweights = dweights + torch.where(chosen, (hidden * dhidden).sum(-1, keepdim=True), 0.0)
        dhidden = dhidden * torch.where(chosen, topk_weights, 0.0).sum(-1, keepdim=True)
        dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        dx = dx + torch.where(mine, torch.cat((dgate, dhidden * gate * sigmoid), -1) @ first, 0.0)
    return dx.to(x_TK.dtype), None, None, dweights, None, None, None, None, None, None


def _decode(weight: Tensor, scale: Tensor | None, expert: int, shape: tuple[int, int], format: str, blocksize: int) -> Tensor:
    if format in FOUR_BIT_FORMATS:
        # The op, not its reference, whose code book is no part of a graph that is being compiled.
        assert scale is not None
        decoded: Tensor = torch.ops.q.dequantize_4bit(weight[expert], scale[expert], blocksize, format, shape, torch.float32)
        return decoded
    return decode_expert(weight, scale, expert, shape, format, blocksize).float()


route_topk = Gradient(save=_save_route_topk, backward=_backward_route_topk, inputs=("logits_TE",))
fused_moe = Gradient(save=_save_fused_moe, backward=_backward_fused_moe, inputs=("x_TK", "topk_weights"))
