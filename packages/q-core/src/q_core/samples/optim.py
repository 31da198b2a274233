"""Sample calls of the optim family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from q_core.formats.codebooks import dynamic_map
from q_core.samples.make import Make

SHAPES: tuple[tuple[int, ...], ...] = ((300,), (16, 33), (1,), (256, 2))
HYPERPARAMETERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}


def _parameters(make: Make, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "name": "adamw",
        "params": [make.normal(*shape, dtype=dtype) for shape in SHAPES],
        "grads": [make.normal(*shape, dtype=dtype) for shape in SHAPES],
    }


def optimizer_step_8bit(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for blocksize in (256, 64):
        blocks = [-(-torch.Size(shape).numel() // blocksize) for shape in SHAPES]
        yield _parameters(make, dtype) | {
            "state1": [make.integers(*shape, low=0, high=256, dtype=torch.uint8) for shape in SHAPES],
            "state2": [make.integers(*shape, low=0, high=256, dtype=torch.uint8) for shape in SHAPES],
            "absmax1": [make.uniform(n, low=0.1) for n in blocks],
            "absmax2": [make.uniform(n, low=0.1) for n in blocks],
            "code1": dynamic_map(signed=True), "code2": dynamic_map(signed=False),
            **HYPERPARAMETERS, "blocksize": blocksize,
        }  # fmt: skip


def optimizer_step_32bit(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    yield _parameters(make, dtype) | {
        "state1": [make.normal(*shape) for shape in SHAPES],
        "state2": [make.uniform(*shape) for shape in SHAPES],
        **HYPERPARAMETERS,
    }
