"""Seeded tensors for sample calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Make:
    """Makes the tensors of sample calls on the CPU, the same ones every time."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator, dtype=torch.float32) * scale).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self._generator) * (high - low) + low

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform in low…high-1."""
        return torch.randint(low, high, shape, generator=self._generator, dtype=torch.int64).to(dtype)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator)

    def strided(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal values in a tensor whose last axis has stride 2."""
        *lead, last = shape
        return self.normal(*lead, 2 * last, dtype=dtype)[..., ::2]

    def choice(self, options: Sequence[int]) -> int:
        return options[int(torch.randint(len(options), (), generator=self._generator))]
