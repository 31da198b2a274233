"""Matrix products of activations with weights: dense, 4-bit, int8.

``x_TK`` may have any number of leading axes. Products are summed in float32 or better, in an order of the backend's choice; scales
and bias enter before the one rounding to the output's dtype.  The gradient goes to ``x`` and ``bias`` (and to a dense weight), never
to codes or scales. Under autocast ``x``, a dense weight and ``bias`` are cast; codes and scales are not.

A weight is in the canonical layout, or in a private one of a backend, brought there by :func:`prepack_weight` and named by ``layout``;
only that backend serves a call then. A layout's name is ``<backend>.<name>``. In a backward q-core unpacks the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from q_core import hookspecs
from q_core.dispatch import bound
from q_core.formats.codebooks import FourBitType
from q_core.layouts import CANONICAL, WeightFormatName
from q_core.specs import gemm as spec

_gemm = bound(hookspecs.gemm)
_gemm_4bit = bound(hookspecs.gemm_4bit)
_int8_gemm = bound(hookspecs.int8_gemm)
_gemm_int8_weight = bound(hookspecs.gemm_int8_weight)
_prepack_weight = bound(hookspecs.prepack_weight)
_unpack_weight = bound(hookspecs.unpack_weight)


def gemm(x_TK: Tensor, w_NK: Tensor, *, bias: Tensor | None = None, layout: str = CANONICAL) -> Tensor:
    """Multiply with a dense weight: ``x @ w.T + bias``.

    Args:
        x_TK: float32, bfloat16 or float16 [..., K].
        w_NK: x's dtype [N, K].
        bias: x's dtype [N].
        layout: of the weight, as :func:`prepack_weight` gave it.

    Returns:
        Tensor [..., N] of x's dtype, contiguous.
    """
    spec.check_gemm(x_TK, w_NK, bias, layout)
    return _gemm(x_TK, w_NK, bias, layout)


def gemm_4bit(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    blocksize: int = 64,
    quant_type: FourBitType = "nf4",
    bias: Tensor | None = None,
    activations: Literal["native", "int8"] = "native",
    layout: str = CANONICAL,
) -> Tensor:
    """Multiply with a 4-bit weight: ``x @ dequantize_4bit(packed, …).T + bias``, from one token to prefill sizes.

    Args:
        x_TK: float32, bfloat16 or float16 [..., K].
        packed: uint8, ceil(N * K / 2) elements in any shape, read flat, as :func:`q_core.ops.quantize_4bit` makes them.
        absmax: float32 [ceil(N * K / blocksize)].
        shape: (N, K); any sizes, K need not be a multiple of the blocksize.
        blocksize: elements a block, as the type has it.
        quant_type: as in :func:`q_core.ops.quantize_4bit`.
        bias: x's dtype [N].
        activations: "native", or "int8" to trade accuracy for speed: rows of x are quantized on the way in by the rule of
            :func:`q_core.ops.quantize_int8_rowwise`, and the values of the code book may be rounded to 1/127ths of the block's absmax, so
            that products are those of integers. The gradient is that of the native product.
        layout: of the weight, as :func:`prepack_weight` gave it.

    Returns:
        Tensor [..., N] of x's dtype, contiguous.
    """
    spec.check_gemm_4bit(x_TK, packed, absmax, blocksize, quant_type, shape, bias, activations, layout)
    return _gemm_4bit(x_TK, packed, absmax, blocksize, quant_type, shape, bias, activations, layout)


def int8_gemm(
    a_TK: Tensor,
    b_NK: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = CANONICAL,
) -> Tensor:
    """Multiply int8 rows with int8 rows: ``(a @ b.T) * a_scale * b_scale / 127² + bias``.

    The integer sum is exact (int32; K ≤ 131,071). The rest is float32: ``acc * (a_scale * b_scale * (1 / 16129))``.

    Args:
        a_TK: int8 [..., K].
        b_NK: int8 [N, K].
        a_scale: float32 [...], row absmax of a as :func:`q_core.ops.quantize_int8_rowwise` gives it.
        b_scale: float32 [N], row absmax of b.
        bias: float32, bfloat16 or float16 [N].
        dtype: float32, bfloat16 or float16.
        layout: of b and its scale, as :func:`prepack_weight` gave them.

    Returns:
        Tensor [..., N] of ``dtype``, contiguous. It has no gradient: a backward through it raises.
    """
    spec.check_int8_gemm(a_TK, b_NK, a_scale, b_scale, bias, dtype, layout)
    return _int8_gemm(a_TK, b_NK, a_scale, b_scale, bias, dtype, layout)


def gemm_int8_weight(x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, *, bias: Tensor | None = None, layout: str = CANONICAL) -> Tensor:
    """Multiply with an int8 weight that has one scale a row: ``x @ (w * w_scale / 127).T + bias``.

    Args:
        x_TK: float32, bfloat16 or float16 [..., K].
        w_NK: int8 [N, K].
        w_scale: float32 [N], row absmax of the weight.
        bias: x's dtype [N].
        layout: of the weight, as :func:`prepack_weight` gave it.

    Returns:
        Tensor [..., N] of x's dtype, contiguous.
    """
    spec.check_gemm_int8_weight(x_TK, w_NK, w_scale, bias, layout)
    return _gemm_int8_weight(x_TK, w_NK, w_scale, bias, layout)


@torch.no_grad()
def prepack_weight(
    tensors: Sequence[Tensor], *, format: WeightFormatName, shape: Sequence[int], layout: str, blocksize: int = 64
) -> list[Tensor]:
    """Bring a weight from the canonical layout into a backend's own.

    A private layout orders the same elements otherwise: each tensor keeps its dtype and its shape, and :func:`unpack_weight` gives back
    every bit, those of padding included. It belongs to one process and one device; whatever is saved or moved is canonical.

    A backend serves its layouts' names with this op, with :func:`unpack_weight` and with the products that read them, and lists them in
    ``Backend.layouts``. A format that it doesn't pack, its predicate declines.

    Args:
        tensors: what the weight consists of, each as the canonical layout has it: "dense" the weight, float32, bfloat16 or float16 [N, K];
            "int8" codes, int8 [N, K], and absmax, float32 [N]; a 4-bit type packed, uint8, ceil(N * K / 2) elements in any shape, and
            absmax, float32 [ceil(N * K / blocksize)].
        format: how it is held.
        shape: (N, K).
        layout: name of the layout, ``<backend>.<name>``, one of those that an installed backend lists. "canonical" copies.
        blocksize: elements a block of a 4-bit type.

    Returns:
        New tensors, one for each. The gradient doesn't pass through.
    """
    spec.check_prepack_weight(format, tensors, shape, blocksize, layout)
    return _prepack_weight(format, tensors, shape, blocksize, layout)


@torch.no_grad()
def unpack_weight(
    tensors: Sequence[Tensor], *, format: WeightFormatName, shape: Sequence[int], layout: str, blocksize: int = 64
) -> list[Tensor]:
    """Bring a weight back into the canonical layout, bit for bit.

    Args:
        tensors: what :func:`prepack_weight` gave, dtypes and shapes as there: "dense" float32, bfloat16 or float16 [N, K]; "int8" int8
            [N, K] and float32 [N]; a 4-bit type uint8, ceil(N * K / 2) elements in any shape, and float32 [ceil(N * K / blocksize)].
        format: how the weight is held.
        shape: (N, K).
        layout: the layout it is in.
        blocksize: elements a block of a 4-bit type.

    Returns:
        New tensors, one for each. The gradient doesn't pass through.
    """
    spec.check_unpack_weight(format, tensors, shape, blocksize, layout)
    return _unpack_weight(format, tensors, shape, blocksize, layout)
