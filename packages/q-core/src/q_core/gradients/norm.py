"""Gradients of the norm family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.record import Gradient


def _rms_norm(ctx: Any, x: Tensor, weight: Tensor, eps: float, dy: Tensor, *, weight_position: int) -> tuple[Tensor, Tensor | None]:
    """Gradients to the normed tensor, in float32, and to the weight."""
    x, dy = x.float(), dy.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * scale
    dnormed = dy * weight.float()
    dx = scale * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    dweight = None
    if ctx.needs_input_grad[weight_position]:
        dweight = (dy * normed).reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0).to(weight.dtype)
    return dx, dweight


def _save_rms_norm(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = arguments
    ctx.save_for_backward(x, weight)


def _backward_rms_norm(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = _rms_norm(ctx, x, weight, ctx.eps, dy, weight_position=1)
    return dx.to(x.dtype), dweight, None


def _save_add_rms_norm(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = arguments
    ctx.save_for_backward(output[1], weight)


def _backward_add_rms_norm(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    dx, dweight = _rms_norm(ctx, total, weight, ctx.eps, dy, weight_position=2)
    dx = (dx + dtotal.float()).to(total.dtype)
    return dx, dx, dweight, None


def _save_rotary(ctx: Any, arguments: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, positions, cos, sin, ctx.interleaved = arguments
    ctx.save_for_backward(positions, cos, sin)


def _backward_rotary(ctx: Any, dq_THD: Tensor, dk_TGD: Tensor) -> tuple[Tensor | None, ...]:
    positions, cos, sin = ctx.saved_tensors
    dq_THD, dk_TGD = torch.ops.q.rotary_embedding(dq_THD, dk_TGD, positions, cos, -sin, ctx.interleaved)
    return dq_THD, dk_TGD, None, None, None, None


def _save_silu_and_mul(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(arguments[0])


def _backward_silu_and_mul(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    gate, up = x.float().chunk(2, -1)
    dy = dy.float()
    sigmoid = torch.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return (torch.cat((dgate, dy * F.silu(gate)), -1).to(x.dtype),)


rms_norm = Gradient(save=_save_rms_norm, backward=_backward_rms_norm, inputs=("x", "weight"))
add_rms_norm = Gradient(save=_save_add_rms_norm, backward=_backward_add_rms_norm, inputs=("x", "residual", "weight"))
rotary_embedding = Gradient(save=_save_rotary, backward=_backward_rotary, inputs=("q_THD", "k_TGD"))
silu_and_mul = Gradient(save=_save_silu_and_mul, backward=_backward_silu_and_mul, inputs=("x",))
