"""How large the measured calls are, and what makes their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Check
from q_core.specs import bounds

try:
    import bitsandbytes
except ImportError:  # its figures are then absent, and the page says so
    BITSANDBYTES: ModuleType | None = None
else:
    BITSANDBYTES = bitsandbytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the calls.

    Attributes:
        device: of their tensors.
        rows, width: of what is quantized and normed.
        sides: (N, K) of weights.
        few: numbers of tokens of a decode.
        many: and of a prefill.
        parameters: elements of an optimizer's tensor.
        cached: tokens in the cache of a decode, over all requests.
        requests: among how many requests those are, one case each.
        prompts: (requests, tokens) of prefills.
        heads: query heads, kv heads, head dim.
        experts: (experts, of which a token's, width, inner width) of layers.
    """

    device: torch.device
    rows: int
    width: int
    sides: Sequence[tuple[int, int]]
    few: Sequence[int]
    many: Sequence[int]
    parameters: int
    cached: int
    requests: Sequence[int]
    prompts: Sequence[tuple[int, int]]
    heads: tuple[int, int, int]
    experts: Sequence[tuple[int, int, int, int]]

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype).mul_(scale)


def full(device: torch.device) -> Sizes:
    """Those of today's models; what is streamed is several times the caches."""
    return Sizes(
        device, rows=16384, width=8192, sides=((8192, 8192), (28672, 8192)), few=(1, 4, 16), many=(64, 512, 2048, 8192),
        parameters=2**28, cached=2**17, requests=(1, 8, 64), prompts=((1, 8192), (8, 2048)), heads=(32, 8, 128),
        experts=((8, 2, 4096, 14336), (128, 8, 2048, 768)),
    )  # fmt: skip


def small(device: torch.device) -> Sizes:
    """For tests of the cases themselves, in the interpreter too."""
    return Sizes(
        device, rows=4, width=256, sides=((64, 128),), few=(1, 3), many=(20,), parameters=3000, cached=64, requests=(1, 2),
        prompts=((2, 20),), heads=(4, 2, 16), experts=((4, 2, 64, 32),),
    )  # fmt: skip


def agrees(got: Callable[[], Any], exact: Callable[[], Any], dtype: torch.dtype) -> Check:
    """Check tensors, each against one in float64, by the bound of a dtype's results."""

    def error() -> float:
        pairs = zip(_tensors(got()), _tensors(exact()), strict=True)
        return max(float((mine.double() - right.double()).norm() / right.double().norm()) for mine, right in pairs)

    return Check(error, bounds.FACTOR[dtype] * torch.finfo(dtype).eps)


def equals(got: Callable[[], Any], exact: Callable[[], Any]) -> Check:
    """Check codes and scales, bit for bit."""

    def error() -> float:
        pairs = zip(_tensors(got()), _tensors(exact()), strict=True)
        return max(float((mine.cpu() != right.cpu()).double().mean()) for mine, right in pairs)

    return Check(error, 0.0)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
