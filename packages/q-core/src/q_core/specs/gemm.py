"""Records of the gemm family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.gradients import gemm as gradients
from q_core.layouts import CANONICAL
from q_core.operand import Operand
from q_core.record import OpRecord
from q_core.samples import gemm as samples
from q_core.specs import bounds, check
from q_core.specs.quantize import check_packed

MAX_INT8_K = 131_071
"""Largest K for which a sum of products of int8 can't overflow int32: one more, of -128 with -128, would be 2^31."""

ACTIVATIONS = ("native", "int8")
WEIGHT_FORMATS = ("dense", "int8", *FOUR_BIT_BOOKS)


def _features(op: str, argument: str, x: Tensor, K: int, remedy: str = "") -> None:
    if x.dim() == 0 or x.shape[-1] != K:
        check.wrong_shape(op, argument, check.shape_of(x), f"[..., {K}], the weight's in features", remedy)


def _weight(op: str, argument: str, w: Tensor) -> None:
    if w.dim() != 2:
        check.wrong_shape(op, argument, check.shape_of(w), "[N, K]")


def _vector(op: str, argument: str, tensor: Tensor, N: int) -> None:
    if tensor.dim() != 1 or tensor.shape[0] != N:
        check.wrong_shape(op, argument, check.shape_of(tensor), f"[{N}], one a row of the weight")


def _bias(op: str, bias: Tensor | None, N: int, dtype: torch.dtype) -> None:
    if bias is not None:
        check.same_dtype(op, "bias", bias, "x_TK", dtype)
        _vector(op, "bias", bias, N)


def check_gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, layout: str) -> None:
    op = "gemm"
    check.one_device(op, ("x_TK", "w_NK", "bias"), x_TK, w_NK, bias)
    check.floating(op, "x_TK", x_TK)
    check.same_dtype(op, "w_NK", w_NK, "x_TK", x_TK.dtype)
    _weight(op, "w_NK", w_NK)
    N, K = w_NK.shape
    _features(op, "x_TK", x_TK, K)
    _bias(op, bias, N, x_TK.dtype)


def check_gemm_4bit(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
    activations: str,
    layout: str,
) -> None:
    op = "gemm_4bit"
    check.one_device(op, ("x_TK", "packed", "absmax", "bias"), x_TK, packed, absmax, bias)
    check.floating(op, "x_TK", x_TK)
    if len(shape) != 2:
        check.wrong_value(op, "shape", tuple(shape), "(N, K)")
    N, K = shape
    check_packed(op, packed, absmax, blocksize, quant_type, N * K)
    if activations not in ACTIVATIONS:
        check.wrong_value(op, "activations", activations, "one of " + ", ".join(map(repr, ACTIVATIONS)))
    _features(op, "x_TK", x_TK, K)
    _bias(op, bias, N, x_TK.dtype)


def check_int8_gemm(
    a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> None:
    op = "int8_gemm"
    check.one_device(op, ("a_TK", "b_NK", "a_scale", "b_scale", "bias"), a_TK, b_NK, a_scale, b_scale, bias)
    check.exact_dtype(op, "a_TK", a_TK, torch.int8, "quantize it with quantize_int8_rowwise first")
    check.exact_dtype(op, "b_NK", b_NK, torch.int8, "quantize it with quantize_int8_rowwise first")
    check.exact_dtype(op, "a_scale", a_scale, torch.float32)
    check.exact_dtype(op, "b_scale", b_scale, torch.float32)
    _weight(op, "b_NK", b_NK)
    N, K = b_NK.shape
    _features(op, "a_TK", a_TK, K)
    if K > MAX_INT8_K:
        check.wrong_shape(op, "b_NK", check.shape_of(b_NK), f"K of at most {MAX_INT8_K}, where int32 sums are exact")
    if a_scale.shape != a_TK.shape[:-1]:
        check.wrong_shape(op, "a_scale", check.shape_of(a_scale), f"{check.shape_of(a_TK)[:-1]}, one a row of a_TK")
    _vector(op, "b_scale", b_scale, N)
    check.output_dtype(op, dtype)
    if bias is not None:
        check.floating(op, "bias", bias)
        _vector(op, "bias", bias, N)


def check_gemm_int8_weight(x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, layout: str) -> None:
    op = "gemm_int8_weight"
    check.one_device(op, ("x_TK", "w_NK", "w_scale", "bias"), x_TK, w_NK, w_scale, bias)
    check.floating(op, "x_TK", x_TK)
    check.exact_dtype(op, "w_NK", w_NK, torch.int8, "quantize it with quantize_int8_rowwise first")
    check.exact_dtype(op, "w_scale", w_scale, torch.float32)
    _weight(op, "w_NK", w_NK)
    N, K = w_NK.shape
    _features(op, "x_TK", x_TK, K)
    _vector(op, "w_scale", w_scale, N)
    _bias(op, bias, N, x_TK.dtype)


def _product(x_TK: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    return x_TK.new_empty((*x_TK.shape[:-1], N), dtype=dtype)


def fake_gemm(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    check_gemm(x_TK, w_NK, bias, layout)
    return _product(x_TK, w_NK.shape[0], x_TK.dtype)


def fake_gemm_4bit(
    x_TK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    bias: Tensor | None,
    activations: str,
    layout: str,
) -> Tensor:
    check_gemm_4bit(x_TK, packed, absmax, blocksize, quant_type, shape, bias, activations, layout)
    return _product(x_TK, shape[0], x_TK.dtype)


def fake_int8_gemm(
    a_TK: Tensor, b_NK: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, layout: str
) -> Tensor:
    check_int8_gemm(a_TK, b_NK, a_scale, b_scale, bias, dtype, layout)
    return _product(a_TK, b_NK.shape[0], dtype)


def fake_gemm_int8_weight(x_TK: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    check_gemm_int8_weight(x_TK, w_NK, w_scale, bias, layout)
    return _product(x_TK, w_NK.shape[0], x_TK.dtype)


def _check_parts(op: str, format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int) -> None:
    if format not in WEIGHT_FORMATS:
        check.wrong_value(op, "format", format, "one of " + ", ".join(map(repr, WEIGHT_FORMATS)))
    if len(shape) != 2:
        check.wrong_value(op, "shape", tuple(shape), "(N, K)")
    count = 1 if format == "dense" else 2
    if len(tensors) != count:
        raise ValueError(f"{op}: tensors has {len(tensors)} tensors, expected {count} for a weight held as {format!r}.")
    check.one_device(op, [f"tensors[{i}]" for i in range(count)], *tensors)
    N, K = shape
    if format in FOUR_BIT_BOOKS:
        check_packed(op, tensors[0], tensors[1], blocksize, format, N * K)
        return
    if format == "dense":
        check.floating(op, "tensors[0]", tensors[0])
    else:
        check.exact_dtype(op, "tensors[0]", tensors[0], torch.int8)
        check.exact_dtype(op, "tensors[1]", tensors[1], torch.float32)
        _vector(op, "tensors[1]", tensors[1], N)
    if check.shape_of(tensors[0]) != [N, K]:
        check.wrong_shape(op, "tensors[0]", check.shape_of(tensors[0]), f"[{N}, {K}]")


def check_prepack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> None:
    _check_parts("prepack_weight", format, tensors, shape, blocksize)


def check_unpack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> None:
    _check_parts("unpack_weight", format, tensors, shape, blocksize)


def fake_prepack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
    check_prepack_weight(format, tensors, shape, blocksize, layout)
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def fake_unpack_weight(format: str, tensors: Sequence[Tensor], shape: Sequence[int], blocksize: int, layout: str) -> list[Tensor]:
    check_unpack_weight(format, tensors, shape, blocksize, layout)
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


PARTS: dict[str, tuple[Operand, ...]] = {
    "dense": (Operand(check.FLOATS, "N, K"),),
    "int8": (Operand((torch.int8,), "N, K"), Operand((torch.float32,), "N")),
    **dict.fromkeys(
        FOUR_BIT_BOOKS,
        (
            Operand((torch.uint8,), "ceil(N * K / 2)", flat=True),
            Operand((torch.float32,), "ceil(N * K / blocksize)"),
        ),
    ),
}
"""What a weight consists of, by the format that it is held in."""

BIAS_AND_LAYOUT: dict[str, Any] = {"bias": None, "layout": CANONICAL}

RECORDS = (
    OpRecord(
        name="gemm",
        family="gemm",
        check=check_gemm,
        fake=fake_gemm,
        operands={
            "x_TK": Operand(check.FLOATS, "..., K"),
            "w_NK": Operand(("x_TK",), "N, K"),
            "bias": Operand(("x_TK",), "N"),
        },
        outputs={"output": Operand(("x_TK",), "..., N")},
        samples=samples.gemm,
        bound=bounds.gemm,
        neutral=BIAS_AND_LAYOUT,
        gradient=gradients.gemm,
        autocast=("x_TK", "w_NK", "bias"),
    ),
    OpRecord(
        name="gemm_4bit",
        family="gemm",
        check=check_gemm_4bit,
        fake=fake_gemm_4bit,
        operands={
            "x_TK": Operand(check.FLOATS, "..., K"),
            "packed": Operand((torch.uint8,), "ceil(N * K / 2)", flat=True),
            "absmax": Operand((torch.float32,), "ceil(N * K / blocksize)"),
            "bias": Operand(("x_TK",), "N"),
        },
        outputs={"output": Operand(("x_TK",), "..., N")},
        sizes={"shape": "N, K"},
        samples=samples.gemm_4bit,
        bound=bounds.gemm_4bit,
        neutral=BIAS_AND_LAYOUT | {"activations": "native"},
        gradient=gradients.gemm_4bit,
        autocast=("x_TK", "bias"),
    ),
    OpRecord(
        name="int8_gemm",
        family="gemm",
        check=check_int8_gemm,
        fake=fake_int8_gemm,
        operands={
            "a_TK": Operand((torch.int8,), "..., K"),
            "b_NK": Operand((torch.int8,), "N, K"),
            "a_scale": Operand((torch.float32,), "..."),
            "b_scale": Operand((torch.float32,), "N"),
            "bias": Operand(check.FLOATS, "N"),
        },
        outputs={"output": Operand(("dtype",), "..., N")},
        samples=samples.int8_gemm,
        bound=bounds.int8_gemm,
        neutral=BIAS_AND_LAYOUT,
    ),
    OpRecord(
        name="gemm_int8_weight",
        family="gemm",
        check=check_gemm_int8_weight,
        fake=fake_gemm_int8_weight,
        operands={
            "x_TK": Operand(check.FLOATS, "..., K"),
            "w_NK": Operand((torch.int8,), "N, K"),
            "w_scale": Operand((torch.float32,), "N"),
            "bias": Operand(("x_TK",), "N"),
        },
        outputs={"output": Operand(("x_TK",), "..., N")},
        samples=samples.gemm_int8_weight,
        bound=bounds.gemm_int8_weight,
        neutral=BIAS_AND_LAYOUT,
        gradient=gradients.gemm_int8_weight,
        autocast=("x_TK", "bias"),
    ),
    OpRecord(
        name="prepack_weight",
        family="gemm",
        check=check_prepack_weight,
        fake=fake_prepack_weight,
        operands={
            "tensors": PARTS,
        },
        outputs={"output": PARTS},
        sizes={"shape": "N, K"},
        samples=samples.prepack_weight,
    ),
    OpRecord(
        name="unpack_weight",
        family="gemm",
        check=check_unpack_weight,
        fake=fake_unpack_weight,
        operands={
            "tensors": PARTS,
        },
        outputs={"output": PARTS},
        sizes={"shape": "N, K"},
        samples=samples.unpack_weight,
    ),
)
