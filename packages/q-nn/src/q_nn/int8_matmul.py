"""The product of LLM.int8() (arXiv 2208.07339) with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from q_core import ops
from q_core.layouts import CANONICAL


def int8_matmul(x_TK: Tensor, codes_NK: Tensor, absmax: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    """Quantize the rows of ``x`` to int8 and multiply them with an int8 weight.

    Args:
        x_TK: float32, bfloat16 or float16 [..., K]; cast first where autocast is on.
        codes_NK: int8 [N, K].
        absmax: float32 [N].
        bias: float32, bfloat16 or float16 [N].
        layout: of the weight.

    Returns:
        Tensor [..., N] of x's dtype. Its gradient with respect to ``x`` is ``dy @ dequant(weight)``: rounding counts as the identity.
    """
    kind = x_TK.device.type
    if torch.is_autocast_enabled(kind):
        x_TK = x_TK.to(torch.get_autocast_dtype(kind))
    if torch.is_grad_enabled():
        result: Tensor = _Int8Matmul.apply(x_TK, codes_NK, absmax, bias, layout)  # type: ignore[no-untyped-call]
        return result
    return _product(x_TK, codes_NK, absmax, bias, layout)


def _product(x_TK: Tensor, codes_NK: Tensor, absmax: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    q_TK, row_absmax, _ = ops.quantize_int8_rowwise(x_TK, threshold=0.0)
    return ops.int8_gemm(q_TK, codes_NK, row_absmax, absmax, bias=bias, dtype=x_TK.dtype, layout=layout)


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(x_TK: Tensor, codes_NK: Tensor, absmax: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        return _product(x_TK, codes_NK, absmax, bias, layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes_NK, absmax, bias, ctx.layout = inputs
        ctx.save_for_backward(codes_NK, absmax)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TN,) = gradients
        codes_NK, absmax = ctx.saved_tensors
        dx_TK = dbias = None
        if ctx.needs_input_grad[0]:
            if ctx.layout != CANONICAL:
                codes_NK, absmax = ops.unpack_weight([codes_NK, absmax], format="int8", shape=codes_NK.shape, layout=ctx.layout)
            dx_TK = dy_TN @ (codes_NK.float() * (absmax / 127).unsqueeze(1)).to(dy_TN.dtype)
        if ctx.needs_input_grad[3]:
            dbias = dy_TN.reshape(-1, dy_TN.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx_TK, None, None, dbias, None
