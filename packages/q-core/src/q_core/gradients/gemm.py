"""Gradients of the gemm family: to activations and bias, and to a dense weight; never to codes or scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from q_core.int8_weight import multiply_rows
from q_core.layouts import CANONICAL
from q_core.record import Gradient


def _rows(tensor: Tensor) -> Tensor:
    """One leading axis; a vector is one row."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _bias(ctx: Any, dy_TN: Tensor, position: int) -> Tensor | None:
    return _rows(dy_TN).sum(0) if ctx.needs_input_grad[position] else None


def _canonical(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> Sequence[Tensor]:
    if layout == CANONICAL:
        return tensors
    unpacked: Sequence[Tensor] = torch.ops.q.unpack_weight(format, tensors, shape, blocksize, layout)
    return unpacked


def _save_gemm(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    x_TK, w_NK, _, ctx.layout = arguments
    if ctx.layout != CANONICAL and ctx.needs_input_grad[1]:
        raise RuntimeError(f"gemm has no gradient to a weight in the layout {ctx.layout!r}: train the canonical one.")
    ctx.save_for_backward(x_TK if ctx.needs_input_grad[1] else None, w_NK if ctx.needs_input_grad[0] else None)


def _backward_gemm(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
    x_TK, w_NK = ctx.saved_tensors
    dx_TK = None
    if ctx.needs_input_grad[0]:
        (w_NK,) = _canonical("dense", [w_NK], w_NK.shape, 0, ctx.layout)
        dx_TK = dy_TN @ w_NK
    dw_NK = _rows(dy_TN).T @ _rows(x_TK) if ctx.needs_input_grad[1] else None
    return dx_TK, dw_NK, _bias(ctx, dy_TN, 2), None


def _save_4bit(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, blocksize, quant_type, shape, _, _, layout = arguments
    ctx.save_for_backward(packed, absmax)
    ctx.format = blocksize, quant_type, tuple(shape), layout


def _backward_4bit(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
    dx_TK = None
    if ctx.needs_input_grad[0]:
        blocksize, quant_type, shape, layout = ctx.format
        packed, absmax = _canonical(quant_type, ctx.saved_tensors, shape, blocksize, layout)
        dx_TK = dy_TN @ torch.ops.q.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dy_TN.dtype)
    return dx_TK, None, None, None, None, None, _bias(ctx, dy_TN, 6), None, None


def _save_int8(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    _, w_NK, w_scale, _, ctx.layout = arguments
    ctx.save_for_backward(w_NK, w_scale)


def _backward_int8(ctx: Any, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
    dx_TK = None
    if ctx.needs_input_grad[0]:
        w_NK, w_scale = ctx.saved_tensors
        w_NK, w_scale = _canonical("int8", [w_NK, w_scale], w_NK.shape, 0, ctx.layout)
        dx_TK = multiply_rows(dy_TN, w_NK, w_scale)
    return dx_TK, None, None, _bias(ctx, dy_TN, 3), None


gemm = Gradient(save=_save_gemm, backward=_backward_gemm, inputs=("x_TK", "w_NK", "bias"))
gemm_4bit = Gradient(save=_save_4bit, backward=_backward_4bit, inputs=("x_TK", "bias"))
gemm_int8_weight = Gradient(save=_save_int8, backward=_backward_int8, inputs=("x_TK", "bias"))
