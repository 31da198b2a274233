"""Fixtures: ISA levels and threads, and the block-wise rule as an oracle in torch's own ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from q_cpu.runtime import native

MACHINE_ISA = native.isa()

torch.set_num_threads(1)  # a core that something else uses would stall every shared loop; test_threads.py asks for more


@pytest.fixture(scope="module", params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each ISA level that this machine has, in turn, within this process."""
    native.set_isa(request.param)
    yield request.param
    native.set_isa(MACHINE_ISA)


@pytest.fixture(params=["exchange", "attributes"])
def reader(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways in which the bindings read tensors."""
    exchange = request.param == "exchange"
    if native.use_exchange_api(exchange) != exchange:
        native.use_exchange_api(True)
        pytest.skip(f"torch {torch.__version__} has no DLPack exchange API")
    yield request.param
    native.use_exchange_api(True)


@pytest.fixture(scope="session")
def exhaustive(pytestconfig: pytest.Config) -> bool:
    """Whether every case is wanted, where some stand for all."""
    return bool(pytestconfig.getoption("exhaustive"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _encode_blocks(
    A: Tensor, book: Tensor, blocksize: int, scale: Callable[[Tensor], Tensor] = lambda absmax: absmax
) -> tuple[Tensor, Tensor]:
    """Index of the nearest entry of an ascending book, and scales: the rule of ``q_core.ops.quantize`` spelled out, flat."""
    flat = A.reshape(-1).float()
    blocks = -(-flat.numel() // blocksize)
    padded = torch.zeros(blocks * blocksize)
    padded[: flat.numel()] = flat
    x = padded.view(blocks, blocksize)
    absmax = scale(torch.where(x.isnan().any(1), torch.nan, x.abs().amax(1)) if blocks else torch.empty(0))
    scaled = (x * (1 / absmax)[:, None]).clamp(-1, 1)
    tiny = absmax < torch.finfo(torch.float32).smallest_normal
    scaled[tiny] = x[tiny] / absmax[tiny, None]
    scaled[(absmax == 0) | ~absmax.isfinite()] = 0
    codes = torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, right=False)
    return codes.to(torch.uint8).view(-1)[: flat.numel()], absmax


@pytest.fixture(scope="session")
def encode_blocks() -> Callable[..., tuple[Tensor, Tensor]]:
    return _encode_blocks
