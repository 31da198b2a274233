"""LLM.int8()'s product (arXiv 2208.07339) with its gradients: rounding counts as the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_core import ops
from q_core.int8_weight import multiply_rows
from q_core.layouts import CANONICAL
from q_nn.mixed_product import rounded_product


def int8_matmul(x_TK: Tensor, codes_NK: Tensor, absmax: Tensor, bias: Tensor | None, *, threshold: float, layout: str) -> Tensor:
    """Multiply with an int8 weight that is frozen.

    Args:
        x_TK: float32, bfloat16 or float16 [..., K]; cast first where autocast is on.
        codes_NK: int8 [N, K].
        absmax: float32 [N].
        bias: float32, bfloat16 or float16 [N].
        threshold: as :func:`rounded_product` takes it.
        layout: of the weight.

    Returns:
        Tensor [..., N] of x's dtype. Its gradient with respect to ``x`` is ``dy @ dequant(weight)``.
    """
    x_TK = _autocast(x_TK)
    if torch.is_grad_enabled():
        result: Tensor = _FrozenWeight.apply(x_TK, codes_NK, absmax, bias, threshold, layout)  # type: ignore[no-untyped-call]
        return result
    return rounded_product(x_TK, codes_NK, absmax, bias, threshold=threshold, layout=layout)


def int8_matmul_dense(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, *, threshold: float) -> Tensor:
    """Multiply with a dense weight, quantized on the way in as the activations are; columns that meet outliers are taken as they are.

    Args:
        x_TK: float32, bfloat16 or float16 [..., K]; cast first where autocast is on.
        w_NK: float32, bfloat16 or float16 [N, K].
        bias: float32, bfloat16 or float16 [N].
        threshold: as :func:`rounded_product` takes it.

    Returns:
        Tensor [..., N] of x's dtype. Its gradients are those of the dense product: ``dy @ w`` and ``dy.T @ x``.
    """
    x_TK = _autocast(x_TK)
    if torch.is_grad_enabled():
        result: Tensor = _DenseWeight.apply(x_TK, w_NK, bias, threshold)  # type: ignore[no-untyped-call]
        return result
    return _quantize_and_multiply(x_TK, w_NK, bias, threshold)


def _quantize_and_multiply(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    codes_NK, absmax, _ = ops.quantize_int8_rowwise(w_NK)
    return rounded_product(x_TK, codes_NK, absmax, bias, w_NK, threshold=threshold, layout=CANONICAL)


def _autocast(x_TK: Tensor) -> Tensor:
    kind = x_TK.device.type
    return x_TK.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x_TK


def _rows(tensor: Tensor) -> Tensor:
    """One leading axis; a vector is one row."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _bias_gradient(ctx: Any, dy_TN: Tensor, position: int) -> Tensor | None:
    return _rows(dy_TN).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[position] else None


class _FrozenWeight(torch.autograd.Function):
    @staticmethod
    def forward(x_TK: Tensor, codes_NK: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, layout: str) -> Tensor:
        return rounded_product(x_TK, codes_NK, absmax, bias, threshold=threshold, layout=layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes_NK, absmax, bias, _, ctx.layout = inputs
        ctx.save_for_backward(codes_NK, absmax)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TN,) = gradients
        codes_NK, absmax = ctx.saved_tensors
        dx_TK = None
        if ctx.needs_input_grad[0]:
            if ctx.layout != CANONICAL:
                codes_NK, absmax = ops.unpack_weight([codes_NK, absmax], format="int8", shape=codes_NK.shape, layout=ctx.layout)
            dx_TK = multiply_rows(dy_TN, codes_NK, absmax)
        return dx_TK, None, None, _bias_gradient(ctx, dy_TN, 3), None, None


class _DenseWeight(torch.autograd.Function):
    @staticmethod
    def forward(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        return _quantize_and_multiply(x_TK, w_NK, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_TK, w_NK, bias, _ = inputs
        ctx.save_for_backward(x_TK if ctx.needs_input_grad[1] else None, w_NK if ctx.needs_input_grad[0] else None)
        ctx.weight_dtype = w_NK.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TN,) = gradients
        x_TK, w_NK = ctx.saved_tensors
        dx_TK = dy_TN @ w_NK.to(dy_TN.dtype) if ctx.needs_input_grad[0] else None
        dw_NK = (_rows(dy_TN).T @ _rows(x_TK)).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return dx_TK, dw_NK, _bias_gradient(ctx, dy_TN, 2), None
