"""Seeded tensors for sample calls.

A sample generator is the one place that knows how a call of its op hangs together. It takes a :class:`Make`, and asks it for tensors and,
through :meth:`Make.cases` and :meth:`Make.option`, for sizes and settings. This one answers with the table that the generator has; that of
the conformance suite (``q_core.testing.calls``) draws others with hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Case = TypeVar("Case")


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

    def cases(self, table: Iterable[Case], draw: Callable[[Make], Case]) -> Iterable[Case]:
        """The sizes of the calls to make: here the table; where sizes are drawn, one that ``draw`` makes of :meth:`size`."""
        return table

    def option(self, usual: int, *others: int) -> int:
        """A setting: here the usual one; where settings are drawn, any of them."""
        return usual

    def size(self, low: int, high: int) -> int:
        """An axis of low…high."""
        return self.choice(range(low, high + 1))

    def shape(self, *highs: int) -> tuple[int, ...]:
        """Axes of 0…high each."""
        return tuple(self.size(0, high) for high in highs)
