"""Sample calls of the norm family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from q_core.samples.make import Make

SHAPES: tuple[tuple[int, ...], ...] = ((4, 64), (2, 3, 37), (1, 1), (0, 8), (5,))


def draw_shape(make: Make) -> tuple[int, ...]:
    return (*((), make.shape(9), make.shape(3, 5))[make.size(0, 2)], make.size(1, 80))


def rms_norm(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for shape in make.cases(SHAPES, draw_shape):
        yield {"x": make.normal(*shape, dtype=dtype), "weight": make.normal(shape[-1], dtype=dtype), "eps": 1e-6}
    yield {"x": make.strided(6, 20, dtype=dtype), "weight": make.normal(20, dtype=dtype), "eps": 1e-5}


def add_rms_norm(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for call in rms_norm(make, dtype):
        yield call | {"residual": make.normal(*call["x"].shape, dtype=dtype)}


def draw_heads(make: Make) -> tuple[int, int, int, int, int]:
    T, H, G, F = make.size(0, 9), make.size(1, 5), make.size(1, 3), make.size(1, 12)
    return T, H, G, 2 * F + make.size(0, 3), F


def rotary_embedding(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for T, H, G, D, F in make.cases(((5, 4, 2, 16, 8), (3, 1, 1, 10, 3), (0, 2, 2, 8, 4)), draw_heads):
        angles = make.uniform(32, F, low=-3.0, high=3.0)
        for interleaved in (False, True):
            yield {
                "q_THD": make.normal(T, H, D, dtype=dtype), "k_TGD": make.normal(T, G, D, dtype=dtype),
                "positions": make.integers(T, low=0, high=32), "cos": angles.cos(), "sin": angles.sin(),
                "interleaved": interleaved,
            }  # fmt: skip


def draw_halves(make: Make) -> tuple[int, ...]:
    *lead, half = draw_shape(make)
    return *lead, 2 * half


def silu_and_mul(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for shape in make.cases(((4, 64), (2, 3, 38), (1, 2), (0, 8)), draw_halves):
        yield {"x": make.normal(*shape, dtype=dtype, scale=3.0)}
    yield {"x": make.strided(6, 20, dtype=dtype)}
