"""Quantization and its inverse. Contracts: :mod:`q_core.ops.quantize`.

Codes and scales are the reference's bit for bit, so everything that makes them is launched ``exact``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from q_core.backend import impl
from q_core.formats.codebooks import FOUR_BIT_BOOKS, book_tensor
from q_triton.four_bit_tables import four_bit_table
from q_triton.kernels.blockwise import dequantize_blockwise_kernel, quantize_blockwise_kernel
from q_triton.kernels.four_bit import dequantize_4bit_kernel, largest_absmax_kernel, quantize_4bit_kernel
from q_triton.kernels.int8_rows import outlier_columns_kernel, quantize_int8_rows_kernel
from q_triton.kernels.search import search_table_kernel
from q_triton.launch import launch
from q_triton.shapes import ceil_div, rows_of
from q_triton.tiles import Tile, Tiles, tile

SEARCH_TABLE = Tiles("search_table", (tile(BLOCK=1024, warps=8),))
QUANTIZE_BLOCKWISE = Tiles("quantize_blockwise", (tile(BLOCK=2048, warps=4),))
DEQUANTIZE_BLOCKWISE = Tiles("dequantize_blockwise", (tile(BLOCK=4096, warps=4),))
LARGEST_ABSMAX = Tiles("largest_absmax", (tile(BLOCK=8192, warps=8),))
QUANTIZE_4BIT = Tiles("quantize_4bit", (tile(BLOCK=4096, warps=4),))
DEQUANTIZE_4BIT = Tiles("dequantize_4bit", (tile(BLOCK=4096, warps=4),))
OUTLIER_COLUMNS = Tiles("outlier_columns", (tile(BLOCK_T=16, BLOCK_K=256, warps=4),))
QUANTIZE_INT8_ROWS = Tiles(
    "quantize_int8_rows",
    (
        tile(BLOCK_T=8, BLOCK_K=256, warps=4, up_to=256),
        tile(BLOCK_T=2, BLOCK_K=1024, warps=4, up_to=1024),
        tile(BLOCK_T=1, BLOCK_K=4096, warps=4, up_to=4096),
        tile(BLOCK_T=1, BLOCK_K=8192, warps=8),
    ),
    size="elements of a row",
)

TABLE_FROM = 1 << 18
"""Elements from which a table of the code book is worth its making: some microseconds of the device and a launch."""
PARTS = 512
"""Programs, at most, that look for a tensor's largest absmax: some for each processor of a large GPU, and quickly read again."""


def _in_whole_blocks(chosen: Tile, blocksize: int) -> Tile:
    """The tile, or one so many times as large, warps and all, that it holds a block."""
    times = ceil_div(blocksize, chosen.blocks["BLOCK"])
    return chosen if times == 1 else Tile({"BLOCK": times * chosen.blocks["BLOCK"]}, times * chosen.warps, chosen.stages)


def search_table(book: Tensor) -> Tensor:
    """What :func:`q_triton.kernels.search.nearest_by_table` looks into: int32 [2^15], made anew as it is the caller's book."""
    table = torch.empty(1 << 15, dtype=torch.int32, device=book.device)
    chosen = SEARCH_TABLE.on(book.device)
    launch(
        search_table_kernel, (ceil_div(table.numel(), chosen.blocks["BLOCK"]),), chosen, exact=True,
        book=book, table=table, entries=book.numel(),
    )  # fmt: skip
    return table


@impl
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize flat blocks of ``A`` to the nearest entries of a code book: codes, absmax."""
    x, book, numel = A.contiguous(), code.contiguous(), A.numel()
    codes = torch.empty(A.shape, dtype=torch.uint8, device=A.device)
    absmax = torch.empty(ceil_div(numel, blocksize), dtype=torch.float32, device=A.device)
    chosen = _in_whole_blocks(QUANTIZE_BLOCKWISE.on(A.device), blocksize)
    launch(
        quantize_blockwise_kernel, (ceil_div(numel, chosen.blocks["BLOCK"]),), chosen, exact=True,
        x=x, book=book, table=search_table(book) if numel >= TABLE_FROM else None, codes=codes, absmax=absmax,
        numel=numel, entries=book.numel(), SIZE=blocksize,
    )  # fmt: skip
    return codes, absmax


@impl
def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Decode what ``quantize_blockwise`` made."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    chosen = _in_whole_blocks(DEQUANTIZE_BLOCKWISE.on(codes.device), blocksize)
    launch(
        dequantize_blockwise_kernel, (ceil_div(out.numel(), chosen.blocks["BLOCK"]),), chosen,
        codes=codes.contiguous(), absmax=absmax.contiguous(), book=code.contiguous(), out=out, numel=out.numel(), SIZE=blocksize,
    )  # fmt: skip
    return out


@impl
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Quantize flat blocks of ``A`` to a 4-bit format: packed codes, absmax."""
    x, numel, rule = A.contiguous(), A.numel(), FOUR_BIT_BOOKS[quant_type].scale
    packed = torch.empty(ceil_div(numel, 2), dtype=torch.uint8, device=A.device)
    absmax = torch.empty(ceil_div(numel, blocksize), dtype=torch.float32, device=A.device)
    largest = _largest_absmax(x, blocksize) if rule == "e4m3" else None
    chosen = _in_whole_blocks(QUANTIZE_4BIT.on(A.device), blocksize)
    launch(
        quantize_4bit_kernel, (ceil_div(numel, chosen.blocks["BLOCK"]),), chosen, exact=True,
        x=x, table=four_bit_table(quant_type, A.device), packed=packed, absmax=absmax, largest=largest, numel=numel,
        size=packed.numel(), parts=0 if largest is None else largest.numel(), PARTS=PARTS, RULE=rule, SIZE=blocksize,
    )  # fmt: skip
    return packed, absmax


def _largest_absmax(x: Tensor, blocksize: int) -> Tensor:
    """Bits (int32) of the largest finite absmax of each of some parts of a tensor."""
    chosen = _in_whole_blocks(LARGEST_ABSMAX.on(x.device), blocksize)
    largest = torch.empty(min(PARTS, ceil_div(x.numel(), chosen.blocks["BLOCK"])), dtype=torch.int32, device=x.device)
    launch(
        largest_absmax_kernel, (largest.numel(),), chosen,
        x=x, largest=largest, numel=x.numel(), SIZE=blocksize,
    )  # fmt: skip
    return largest


@impl
def dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Decode what ``quantize_4bit`` made."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    chosen = _in_whole_blocks(DEQUANTIZE_4BIT.on(packed.device), blocksize)
    launch(
        dequantize_4bit_kernel, (ceil_div(out.numel(), chosen.blocks["BLOCK"]),), chosen,
        packed=packed.contiguous(), absmax=absmax.contiguous(), book=book_tensor(quant_type, packed.device), out=out,
        numel=out.numel(), size=packed.numel(), SIZE=blocksize,
    )  # fmt: skip
    return out


@impl
def quantize_int8_rowwise(A_TK: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows to int8 with one scale a row, outlier columns set aside: codes, row absmax, outlier mask."""
    rows, K = rows_of(A_TK), A_TK.shape[-1]
    T = math.prod(A_TK.shape[:-1])
    codes = torch.empty(A_TK.shape, dtype=torch.int8, device=A_TK.device)
    absmax = torch.empty(A_TK.shape[:-1], dtype=torch.float32, device=A_TK.device)
    outliers = torch.zeros(K, dtype=torch.bool, device=A_TK.device)
    marks = outliers.view(torch.uint8)
    if threshold:
        chosen = OUTLIER_COLUMNS.on(A_TK.device)
        launch(
            outlier_columns_kernel, (ceil_div(T, chosen.blocks["BLOCK_T"]), ceil_div(K, chosen.blocks["BLOCK_K"])), chosen,
            x=rows, outliers=marks, T=T, K=K, x_stride=rows.stride(0), threshold=threshold,
        )  # fmt: skip
    _int8_rows(rows, codes, absmax, marks, threshold)
    return codes, absmax, outliers


def round_rows(x_TK: Tensor) -> Tensor:
    """Rows as int8 codes and a scale hold them, in their own dtype."""
    out = torch.empty(x_TK.shape, dtype=x_TK.dtype, device=x_TK.device)
    _int8_rows(x_TK, out, None, None, 0.0)
    return out


def _int8_rows(rows: Tensor, codes: Tensor, absmax: Tensor | None, marks: Tensor | None, threshold: float) -> None:
    T, K = rows.shape
    chosen = QUANTIZE_INT8_ROWS.on(rows.device, K)
    launch(
        quantize_int8_rows_kernel, (ceil_div(T, chosen.blocks["BLOCK_T"]),), chosen, exact=True,
        x=rows, codes=codes, absmax=absmax, outliers=marks, T=T, K=K, x_stride=rows.stride(0), threshold=threshold,
        OUTLIERS=threshold > 0, WHOLE=chosen.blocks["BLOCK_K"] >= K,
    )  # fmt: skip
