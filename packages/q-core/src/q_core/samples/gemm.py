"""Sample calls of the gemm family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.layouts import CANONICAL
from q_core.samples.make import Make

SIZES: tuple[tuple[tuple[int, ...], int, int], ...] = (
    ((1,), 32, 64),
    ((4,), 17, 95),
    ((2, 3), 8, 40),
    ((), 5, 64),
    ((0,), 4, 32),
    ((33,), 64, 130),
    ((70,), 3, 33),
)
"""Leading axes of x, N, K."""


def draw_size(make: Make) -> tuple[tuple[int, ...], int, int]:
    lead = ((), make.shape(40), make.shape(3, 7))[make.size(0, 2)]
    return lead, make.size(0, 70), make.size(0, 140)


def _bias(make: Make, index: int, N: int, dtype: torch.dtype) -> Tensor | None:
    return make.normal(N, dtype=dtype) if make.option(index % 2, 0, 1) else None


def gemm(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for i, (lead, N, K) in enumerate(make.cases(SIZES, draw_size)):
        yield {
            "x_TK": make.normal(*lead, K, dtype=dtype),
            "w_NK": make.normal(N, K, dtype=dtype),
            "bias": _bias(make, i, N, dtype),
            "layout": CANONICAL,
        }
    yield {"x_TK": make.strided(5, 24, dtype=dtype), "w_NK": make.strided(9, 24, dtype=dtype), "bias": None, "layout": CANONICAL}


def gemm_4bit(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for quant_type, book in FOUR_BIT_BOOKS.items():
        blocksize = make.option(book.blocksizes[len(book.blocksizes) // 5], *book.blocksizes)
        for i, (lead, N, K) in enumerate(make.cases(SIZES, draw_size)):
            packed = make.integers((N * K + 1) // 2, low=0, high=256, dtype=torch.uint8)
            yield {
                "x_TK": make.normal(*lead, K, dtype=dtype),
                "packed": packed.view(-1, 1) if make.option(i % 2, 0, 1) else packed,
                "absmax": make.uniform(-(-N * K // blocksize), high=2.0),
                "blocksize": blocksize, "quant_type": quant_type, "shape": [N, K], "bias": _bias(make, i, N, dtype),
                "activations": ("native", "int8")[make.option(i // 4 % 2, 0, 1)], "layout": CANONICAL,
            }  # fmt: skip


def int8_gemm(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for i, (lead, N, K) in enumerate(make.cases(SIZES, draw_size)):
        yield {
            "a_TK": make.integers(*lead, K, low=-127, high=128, dtype=torch.int8),
            "b_NK": make.integers(N, K, low=-128, high=128, dtype=torch.int8),
            "a_scale": make.uniform(*lead, high=3.0), "b_scale": make.uniform(N, high=3.0),
            "bias": _bias(make, i, N, dtype), "dtype": dtype, "layout": CANONICAL,
        }  # fmt: skip


def gemm_int8_weight(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for i, (lead, N, K) in enumerate(make.cases(SIZES, draw_size)):
        yield {
            "x_TK": make.normal(*lead, K, dtype=dtype),
            "w_NK": make.integers(N, K, low=-127, high=128, dtype=torch.int8),
            "w_scale": make.uniform(N, high=3.0), "bias": _bias(make, i, N, dtype), "layout": CANONICAL,
        }  # fmt: skip


def prepack_weight(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for N, K in make.cases(((8, 64), (5, 33), (0, 8)), lambda make: (make.size(0, 40), make.size(0, 140))):
        for format in ("dense", "int8", *FOUR_BIT_BOOKS):
            blocksize = FOUR_BIT_BOOKS[format].blocksizes[0] if format in FOUR_BIT_BOOKS else 64
            if format == "dense":
                tensors = [make.normal(N, K, dtype=dtype)]
            elif format == "int8":
                tensors = [make.integers(N, K, low=-127, high=128, dtype=torch.int8), make.uniform(N)]
            else:
                packed = make.integers((N * K + 1) // 2, low=0, high=256, dtype=torch.uint8)
                tensors = [packed, make.uniform(-(-N * K // blocksize))]
            yield {"format": format, "tensors": tensors, "shape": [N, K], "blocksize": blocksize, "layout": CANONICAL}


unpack_weight = prepack_weight
