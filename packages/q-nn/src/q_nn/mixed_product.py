"""LLM.int8()'s product (arXiv 2208.07339): int8 for most columns of the activations, more bits for the few with outliers.

How many columns those are, only the values say. So the product is one operator to the compiler, ``q_nn::mixed_product``, whose shapes
depend on no value; inside, the columns are gathered. Without outliers it is ``q_nn::int8_product``. Neither operator is part of q-core's
surface: they are made of that surface's ops, and no backend implements them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from q_core import ops
from q_core.layouts import CANONICAL

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)  # a captured graph couldn't ask how many columns there are
_LIBRARY = torch.library.Library("q_nn", "FRAGMENT")
_LIBRARY.define(
    "mixed_product(Tensor x_TK, Tensor codes_NK, Tensor absmax, Tensor? bias, Tensor? w_NK, float threshold, str layout) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "int8_product(Tensor x_TK, Tensor codes_NK, Tensor absmax, Tensor? bias, str layout) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def rounded_product(
    x_TK: Tensor,
    codes_NK: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    w_NK: Tensor | None = None,
    *,
    threshold: float,
    layout: str,
) -> Tensor:
    """Quantize the rows of ``x`` to int8 and multiply them with an int8 weight; no gradient.

    Columns of ``x`` with any ``|x| >= threshold`` are left out of that and multiplied in float32, or with 16 bits an element where that is
    faster. The sum is rounded once.

    Args:
        x_TK: float32, bfloat16 or float16 [..., K].
        codes_NK: int8 [N, K].
        absmax: float32 [N].
        bias: float32, bfloat16 or float16 [N].
        w_NK: the weight before it was rounded [N, K], to take the outliers' columns from; decoded if not given.
        threshold: 0 for no outliers.
        layout: of ``codes_NK`` and ``absmax``.

    Returns:
        Tensor [..., N] of x's dtype.
    """
    product: Tensor
    if threshold:
        product = torch.ops.q_nn.mixed_product(x_TK, codes_NK, absmax, bias, w_NK, threshold, layout)
    elif torch.compiler.is_dynamo_compiling():
        # One operator here too: torch 2.11 can't trace sizes of tensors that are made within an autograd.Function.
        product = torch.ops.q_nn.int8_product(x_TK, codes_NK, absmax, bias, layout)
    else:
        product = _int8_product(x_TK, codes_NK, absmax, bias, layout)
    return product


@torch.library.impl(_LIBRARY, "int8_product", "CompositeExplicitAutograd")
def _int8_product(x_TK: Tensor, codes_NK: Tensor, absmax: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    q_TK, row_absmax, _ = ops.quantize_int8_rowwise(x_TK)
    return ops.int8_gemm(q_TK, codes_NK, row_absmax, absmax, bias=bias, dtype=x_TK.dtype, layout=layout)


@torch.library.impl(_LIBRARY, "mixed_product", "CompositeExplicitAutograd")
def _mixed_product(
    x_TK: Tensor,
    codes_NK: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    w_NK: Tensor | None,
    threshold: float,
    layout: str,
) -> Tensor:
    q_TK, row_absmax, outliers = ops.quantize_int8_rowwise(x_TK, threshold=threshold)
    columns = outliers.nonzero().view(-1)  # the one moment at which a device is waited for
    C, T, K, N = columns.numel(), row_absmax.numel(), x_TK.shape[-1], codes_NK.shape[0]
    if not C:
        return ops.int8_gemm(q_TK, codes_NK, row_absmax, absmax, bias=bias, dtype=x_TK.dtype, layout=layout)
    q_TK, row_absmax, rows_TK = q_TK.view(T, K), row_absmax.view(T), x_TK.reshape(T, K)
    # Of 4096 × 4096 weights on one core (q-cpu 0.1) a column takes 40…60 µs to gather, a row 40…80 µs to multiply, but the first three 500.
    if w_NK is None and (layout != CANONICAL or T == 1 or C > 2 * T + 8):
        scaled = [(q_TK, row_absmax), *_two_digits(rows_TK.float().masked_fill(~outliers, 0))]
        q_RK, scales = (torch.cat(parts) for parts in zip(*scaled, strict=True))
        out_TN = ops.int8_gemm(q_RK, codes_NK, scales, absmax, layout=layout).view(3, T, N).sum(0)
        if bias is not None:
            out_TN += bias
    else:
        w_NC = (codes_NK if w_NK is None else w_NK).gather(1, columns.expand(N, C)).float()
        if w_NK is None:
            w_NC *= (absmax / 127).unsqueeze(1)
        out_TN = ops.int8_gemm(q_TK, codes_NK, row_absmax, absmax, bias=bias, layout=layout)
        out_TN.addmm_(rows_TK.index_select(1, columns).float(), w_NC.T)
    return out_TN.to(x_TK.dtype).view(*x_TK.shape[:-1], N)


def _two_digits(x_TK: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales whose sum is ``x`` to 1/64,516 of each row's absmax: its int8 rows, and those of what they miss."""
    high_TK, high, _ = ops.quantize_int8_rowwise(x_TK)
    low_TK, low, _ = ops.quantize_int8_rowwise(x_TK - high_TK * (high / 127).unsqueeze(1))
    return [(high_TK, high), (low_TK, low)]


def _fake_mixed_product(
    x_TK: Tensor,
    codes_NK: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    w_NK: Tensor | None,
    threshold: float,
    layout: str,
) -> Tensor:
    return _int8_product(x_TK, codes_NK, absmax, bias, layout)


def _no_gradient(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError("LLM.int8()'s product has no gradient of its own: train the layer itself, not a graph exported from it")


for _name, _fake in (("mixed_product", _fake_mixed_product), ("int8_product", _int8_product)):
    torch.library.register_fake(f"q_nn::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"q_nn::{_name}", _no_gradient, lib=_LIBRARY)
