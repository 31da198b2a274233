"""LLM.int8()'s product (arXiv 2208.07339): int8 for most columns of the activations, their own dtype for the few with outliers.

How many columns those are, only the values say. So the product is one operator to the compiler, ``q_nn::mixed_product``, whose shapes
depend on no value; inside, the columns are gathered. The operator isn't part of q-core's surface: it is made of that surface's ops, and
no backend implements it.
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

    Columns of ``x`` with any ``|x| >= threshold`` are multiplied in x's dtype instead. The sum has up to three roundings to that dtype:
    the int8 part's, the decoded columns', its own.

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
    if not threshold:
        return _int8_part(x_TK, codes_NK, absmax, bias, threshold, layout)[0]
    product: Tensor = torch.ops.q_nn.mixed_product(x_TK, codes_NK, absmax, bias, w_NK, threshold, layout)
    return product


def _int8_part(
    x_TK: Tensor, codes_NK: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, layout: str
) -> tuple[Tensor, Tensor]:
    """The product without the outliers' columns, and which they are: bool [K]."""
    q_TK, row_absmax, outliers = ops.quantize_int8_rowwise(x_TK, threshold=threshold)
    return ops.int8_gemm(q_TK, codes_NK, row_absmax, absmax, bias=bias, dtype=x_TK.dtype, layout=layout), outliers


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
    out_TN, outliers = _int8_part(x_TK, codes_NK, absmax, bias, threshold, layout)
    columns = outliers.nonzero().view(-1)  # the one moment at which a device is waited for
    C, K = columns.numel(), outliers.numel()
    if not C:
        return out_TN
    rows_TK = x_TK.reshape(x_TK.shape[:-1].numel(), K)
    if w_NK is not None:
        w_NC = w_NK.index_select(1, columns)
    elif layout == CANONICAL and _is_few(C, len(rows_TK), K):
        w_NC = codes_NK.index_select(1, columns).float() * (absmax / 127).unsqueeze(1)
    else:
        return out_TN.add_(ops.gemm_int8_weight(x_TK.masked_fill(~outliers, 0), codes_NK, absmax, layout=layout))
    x_TC = rows_TK.index_select(1, columns)
    out_TN.view(len(rows_TK), w_NC.shape[0]).addmm_(x_TC, w_NC.to(x_TC.dtype).T)
    return out_TN


def _is_few(C: int, T: int, K: int) -> bool:
    """Whether gathering and decoding C columns costs less than a whole product with an int8 weight.

    On one core, with 4096 × 4096 weights (q-cpu 0.1): 14 µs a column, and 390 µs + 84 µs a token.
    """
    return C * 640 <= K * (T + 4)


def _fake_mixed_product(
    x_TK: Tensor,
    codes_NK: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    w_NK: Tensor | None,
    threshold: float,
    layout: str,
) -> Tensor:
    return _int8_part(x_TK, codes_NK, absmax, bias, threshold, layout)[0]


def _no_gradient(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError("q_nn::mixed_product has no gradient: train the layer itself, not a graph exported from it")


torch.library.register_fake("q_nn::mixed_product", _fake_mixed_product, lib=_LIBRARY)
torch.library.register_autograd("q_nn::mixed_product", _no_gradient, lib=_LIBRARY)
