"""Sample calls of the quantize family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from q_core.formats.codebooks import FOUR_BIT_BOOKS, dynamic_map
from q_core.samples.make import Make

SHAPES: tuple[tuple[int, ...], ...] = ((4, 64), (3, 5, 37), (1,), (0, 8), (1000,), (129, 33))


def draw_shape(make: Make) -> tuple[int, ...]:
    return ((), make.shape(700), make.shape(40, 70), make.shape(5, 9, 33))[make.size(0, 3)]


def draw_rows(make: Make) -> tuple[int, ...]:
    return (*((), make.shape(40), make.shape(5, 9))[make.size(0, 2)], make.size(0, 70))


def quantize_blockwise(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for shape in make.cases(SHAPES, draw_shape):
        yield {"A": make.normal(*shape, dtype=dtype), "code": dynamic_map(signed=True), "blocksize": make.choice((32, 64, 256))}
    yield {"A": make.strided(7, 50, dtype=dtype), "code": dynamic_map(signed=True), "blocksize": 64}
    yield {"A": make.uniform(700).to(dtype), "code": dynamic_map(signed=False), "blocksize": 256}
    yield {"A": make.normal(90, dtype=dtype), "code": torch.linspace(-1, 1, 17), "blocksize": 32}


def dequantize_blockwise(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for shape in make.cases(SHAPES, draw_shape):
        codes = make.integers(*shape, low=0, high=256, dtype=torch.uint8)
        blocksize = make.option(64, 32, 256, 1024, 4096)
        blocks = -(-codes.numel() // blocksize)
        yield {
            "codes": codes, "absmax": make.uniform(blocks, high=3.0), "code": dynamic_map(signed=True),
            "blocksize": blocksize, "dtype": dtype,
        }  # fmt: skip


def quantize_4bit(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for quant_type, book in FOUR_BIT_BOOKS.items():
        for shape in make.cases(SHAPES, draw_shape):
            yield {"A": make.normal(*shape, dtype=dtype), "blocksize": make.choice(book.blocksizes[:3]), "quant_type": quant_type}
        yield {"A": make.strided(7, 50, dtype=dtype), "blocksize": book.blocksizes[0], "quant_type": quant_type}


def dequantize_4bit(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for quant_type, book in FOUR_BIT_BOOKS.items():
        blocksize = make.option(book.blocksizes[len(book.blocksizes) // 5], *book.blocksizes)
        for i, shape in enumerate(make.cases(SHAPES, draw_shape)):
            numel = torch.Size(shape).numel()
            packed = make.integers((numel + 1) // 2, low=0, high=256, dtype=torch.uint8)
            yield {
                "packed": packed.view(-1, 1) if make.option(i % 2, 0, 1) else packed,
                "absmax": make.uniform(-(-numel // blocksize), high=3.0),
                "blocksize": blocksize, "quant_type": quant_type, "shape": list(shape), "dtype": dtype,
            }  # fmt: skip


def quantize_int8_rowwise(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for shape in make.cases(((4, 64), (3, 5, 37), (1, 1), (0, 8), (5, 0), (33,)), draw_rows):
        yield {"A_TK": make.normal(*shape, dtype=dtype), "threshold": 0.0}
    yield {"A_TK": make.normal(6, 40, dtype=dtype, scale=3.0), "threshold": 6.0}
    yield {"A_TK": make.strided(6, 40, dtype=dtype), "threshold": 1.5}
    # Half-way between two codes, where the last bit of 127 / absmax decides.
    halves = torch.cat((torch.tensor([254.0]), torch.arange(-253.0, 254, 2)))
    yield {"A_TK": (torch.arange(1.0, 65)[:, None] * halves).to(dtype), "threshold": 0.0}
