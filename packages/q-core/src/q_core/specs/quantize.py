"""Records of the quantize family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.operand import Operand
from q_core.record import OpRecord
from q_core.samples import quantize as samples
from q_core.specs import check


def check_code(op: str, argument: str, code: Tensor) -> None:
    check.exact_dtype(op, argument, code, torch.float32)
    if code.dim() != 1 or not 2 <= code.shape[0] <= 256:
        check.wrong_shape(op, argument, check.shape_of(code), "[2…256]")


def check_absmax(op: str, absmax: Tensor, numel: int, blocksize: int, argument: str = "absmax") -> None:
    check.exact_dtype(op, argument, absmax, torch.float32)
    if absmax.numel() != check.ceil_div(numel, blocksize):
        expected = f"[{check.ceil_div(numel, blocksize)}] for {numel} elements in blocks of {blocksize}"
        check.wrong_shape(op, argument, check.shape_of(absmax), expected)


def check_4bit_format(op: str, blocksize: int, quant_type: str) -> None:
    book = FOUR_BIT_BOOKS.get(quant_type)
    if book is None:
        check.wrong_value(op, "quant_type", quant_type, "one of " + ", ".join(map(repr, FOUR_BIT_BOOKS)))
    if blocksize not in book.blocksizes:
        check.wrong_value(op, "blocksize", blocksize, f"{' or '.join(map(str, book.blocksizes))} for {quant_type!r}")


def check_packed(op: str, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, numel: int) -> None:
    check.exact_dtype(op, "packed", packed, torch.uint8, "quantize with quantize_4bit first")
    check_4bit_format(op, blocksize, quant_type)
    if packed.numel() != (numel + 1) // 2:
        expected = f"{(numel + 1) // 2} bytes for {numel} elements"
        check.wrong_shape(op, "packed", check.shape_of(packed), expected, "is the shape the weight's?")
    check_absmax(op, absmax, numel, blocksize)


def check_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> None:
    op = "quantize_blockwise"
    check.one_device(op, ("A", "code"), A, code)
    check.floating(op, "A", A)
    check_code(op, "code", code)
    check.block_size(op, blocksize)


def check_dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> None:
    op = "dequantize_blockwise"
    check.one_device(op, ("codes", "absmax", "code"), codes, absmax, code)
    check.exact_dtype(op, "codes", codes, torch.uint8, "quantize with quantize_blockwise first")
    check_code(op, "code", code)
    check.block_size(op, blocksize)
    check_absmax(op, absmax, codes.numel(), blocksize)
    check.output_dtype(op, dtype)


def check_quantize_4bit(A: Tensor, blocksize: int, quant_type: str) -> None:
    op = "quantize_4bit"
    check.one_device(op, ("A",), A)
    check.floating(op, "A", A)
    check_4bit_format(op, blocksize, quant_type)


def check_dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> None:
    op = "dequantize_4bit"
    check.one_device(op, ("packed", "absmax"), packed, absmax)
    check_packed(op, packed, absmax, blocksize, quant_type, check.numel_of(shape))
    check.output_dtype(op, dtype)


def check_quantize_int8_rowwise(A_TK: Tensor, threshold: float) -> None:
    op = "quantize_int8_rowwise"
    check.one_device(op, ("A_TK",), A_TK)
    check.floating(op, "A_TK", A_TK)
    if A_TK.dim() == 0:
        check.wrong_shape(op, "A_TK", check.shape_of(A_TK), "[..., K]")
    if not 0.0 <= threshold < float("inf"):
        check.wrong_value(op, "threshold", threshold, "0 (no outliers) or a positive number")


def fake_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check_quantize_blockwise(A, code, blocksize)
    blocks = check.ceil_div(A.numel(), blocksize)
    return A.new_empty(A.shape, dtype=torch.uint8), A.new_empty((blocks,), dtype=torch.float32)


def fake_dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    check_dequantize_blockwise(codes, absmax, code, blocksize, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


def fake_quantize_4bit(A: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    check_quantize_4bit(A, blocksize, quant_type)
    numel = A.numel()
    return (
        A.new_empty(((numel + 1) // 2,), dtype=torch.uint8),
        A.new_empty((check.ceil_div(numel, blocksize),), dtype=torch.float32),
    )


def fake_dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    check_dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype)
    return packed.new_empty(tuple(shape), dtype=dtype)


def fake_quantize_int8_rowwise(A_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize_int8_rowwise(A_TK, threshold)
    return (
        A_TK.new_empty(A_TK.shape, dtype=torch.int8),
        A_TK.new_empty(A_TK.shape[:-1], dtype=torch.float32),
        A_TK.new_empty(A_TK.shape[-1:], dtype=torch.bool),
    )


RECORDS = (
    OpRecord(
        name="quantize_blockwise",
        family="quantize",
        check=check_quantize_blockwise,
        fake=fake_quantize_blockwise,
        operands={
            "A": Operand(check.FLOATS, "..."),
            "code": Operand((torch.float32,), "2…256"),
        },
        outputs={
            "codes": Operand((torch.uint8,), "..."),
            "absmax": Operand((torch.float32,), "ceil(numel / blocksize)"),
        },
        samples=samples.quantize_blockwise,
    ),
    OpRecord(
        name="dequantize_blockwise",
        family="quantize",
        check=check_dequantize_blockwise,
        fake=fake_dequantize_blockwise,
        operands={
            "codes": Operand((torch.uint8,), "..."),
            "absmax": Operand((torch.float32,), "ceil(numel / blocksize)"),
            "code": Operand((torch.float32,), "2…256"),
        },
        outputs={"output": Operand(("dtype",), "...")},
        samples=samples.dequantize_blockwise,
    ),
    OpRecord(
        name="quantize_4bit",
        family="quantize",
        check=check_quantize_4bit,
        fake=fake_quantize_4bit,
        operands={
            "A": Operand(check.FLOATS, "..."),
        },
        outputs={
            "packed": Operand((torch.uint8,), "ceil(numel / 2)"),
            "absmax": Operand((torch.float32,), "ceil(numel / blocksize)"),
        },
        samples=samples.quantize_4bit,
    ),
    OpRecord(
        name="dequantize_4bit",
        family="quantize",
        check=check_dequantize_4bit,
        fake=fake_dequantize_4bit,
        operands={
            "packed": Operand((torch.uint8,), "ceil(numel / 2)", flat=True),
            "absmax": Operand((torch.float32,), "ceil(numel / blocksize)"),
        },
        outputs={"output": Operand(("dtype",), "...")},
        sizes={"shape": "..."},
        samples=samples.dequantize_4bit,
    ),
    OpRecord(
        name="quantize_int8_rowwise",
        family="quantize",
        check=check_quantize_int8_rowwise,
        fake=fake_quantize_int8_rowwise,
        operands={
            "A_TK": Operand(check.FLOATS, "..., K"),
        },
        outputs={
            "q": Operand((torch.int8,), "..., K"),
            "absmax": Operand((torch.float32,), "..."),
            "outliers": Operand((torch.bool,), "K"),
        },
        samples=samples.quantize_int8_rowwise,
        neutral={"threshold": 0.0},
    ),
)
