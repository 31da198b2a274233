"""Tensors of representative calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.record import Arguments

Calls = Iterator[tuple[str, Arguments]]
"""Titles and arguments."""

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = torch.int8, torch.float8_e4m3fn
TITLES = {BF16: "bf16", F16: "f16", F32: "f32", INT8: "int8", FP8: "fp8"}


class Values:
    """Makes tensors on a device, the same ones every time; on torch's meta device they have no values."""

    def __init__(self, device: str | torch.device, seed: int = 0) -> None:
        self.device = torch.device(device)
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self._generator).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        """float32 in 0.5…1.5: scales."""
        return torch.rand(shape, device=self.device, generator=self._generator) + 0.5

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """Uniform in low…high-1."""
        return torch.randint(low, high, shape, dtype=dtype, device=self.device, generator=self._generator)

    def permutation(self, n: int, *, dtype: torch.dtype) -> Tensor:
        return torch.randperm(n, device=self.device, generator=self._generator).to(dtype)

    def given(self, values: Iterable[int], *, dtype: torch.dtype) -> Tensor:
        return torch.tensor(tuple(values), dtype=dtype, device=self.device)

    def codes(self, *shape: int, dtype: torch.dtype = INT8) -> Tensor:
        """Codes of 8 bits, none of them NaN: int8, or float8_e4m3fn."""
        return self.integers(*shape, low=-127, high=128, dtype=INT8) if dtype is INT8 else self.normal(*shape).to(dtype)

    def packed(self, *shape: int) -> Tensor:
        """Any bytes: uint8 codes, or two of 4 bits."""
        return self.integers(*shape, low=0, high=256, dtype=torch.uint8)


def four_bit_blocksize(quant_type: str) -> int:
    """64, or what the type prescribes."""
    sizes = FOUR_BIT_BOOKS[quant_type].blocksizes
    return 64 if 64 in sizes else sizes[0]
