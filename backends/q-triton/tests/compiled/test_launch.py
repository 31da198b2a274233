"""Launches: recorded instead of made, left out where there is nothing to do, refused where the kernel lacks a name."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from q_triton.launch import Launch, launch, recorded
from q_triton.tiles import tile


@triton.jit
def fill_kernel(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, 1.0, at < n)


X = torch.empty(8, device="meta")


def test_what_was_to_be_launched() -> None:
    seen: list[Launch] = []
    with recorded(seen.append):
        launch(fill_kernel, (2, 3), tile(BLOCK=4, warps=8), exact=True, x=X, n=5)
    assert seen == [Launch(fill_kernel, (2, 3), tile(BLOCK=4, warps=8), True, {"x": X, "n": 5})]
    assert seen[0].given == {"x": X, "n": 5, "BLOCK": 4}


def test_recorders_are_nested_and_end() -> None:
    outer: list[Launch] = []
    inner: list[Launch] = []
    with recorded(outer.append):
        with recorded(inner.append):
            launch(fill_kernel, (1,), tile(BLOCK=4), x=X, n=5)
        launch(fill_kernel, (2,), tile(BLOCK=4), x=X, n=5)
    assert ([seen.grid for seen in inner], [seen.grid for seen in outer]) == ([(1,)], [(2,)])


@pytest.mark.parametrize("grid", [(0,), (0, 3), (3, 0, 1)])
def test_an_empty_grid_launches_nothing(grid: tuple[int, ...]) -> None:
    seen: list[Launch] = []
    with recorded(seen.append):
        launch(fill_kernel, grid, tile(BLOCK=4), x=X, n=0)
    assert not seen


def test_names_that_the_kernel_lacks_are_refused() -> None:
    with recorded(lambda made: None):
        with pytest.raises(ValueError, match="fill_kernel has no BLOCK_X, expected x, n, BLOCK"):
            launch(fill_kernel, (1,), tile(BLOCK=4, BLOCK_X=4), x=X, n=5)
        with pytest.raises(ValueError, match="fill_kernel has no count"):
            launch(fill_kernel, (1,), tile(BLOCK=4), x=X, count=5)
