"""Products with int8 weights: every tile of every target, sums at the ends of int32, rows that can't be read 16 elements at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from q_core.layouts import CANONICAL
from q_core.reference import gemm as reference
from q_triton import int8, tiles
from q_triton.targets import target_of
from q_triton.tiles import Tile, Tiles

for platform in ("cuda", "rocm", "xpu"):
    importlib.import_module(f"q_{platform}.tiles")

TARGET = target_of(torch.device("cpu")).name
INT8_TILES = [(few, choice) for few in (int8.INT8_GEMM_FEW, int8.INT8_GEMM) for choice in few.known()]
WEIGHT_TILES = [
    (each, choice, dtype)
    for each, dtype in (
        (int8.GEMM_INT8_WEIGHT_FEW, torch.bfloat16),
        (int8.GEMM_INT8_WEIGHT, torch.bfloat16),
        (int8.GEMM_INT8_WEIGHT, torch.float16),
        (int8.GEMM_INT8_WEIGHT_FLOAT32_FEW, torch.float32),
        (int8.GEMM_INT8_WEIGHT_FLOAT32, torch.float32),
    )
    for choice in each.known()
]


@pytest.fixture(autouse=True)
def _no_tile_stays_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "_tuned", {})
    yield
    tiles._source.cache_clear()


def choose(kernel: Tiles, choice: Tile) -> None:
    tiles.use_tuned(TARGET, {kernel.kernel: (Tile(choice.blocks, choice.warps, choice.stages),)})


def codes(*shape: int, low: int = -128) -> Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int64).to(torch.int8)


def ragged(kernel: Tiles, choice: Tile) -> tuple[int, int, int]:
    """T, N, K with a part of a tile along each axis, and more than one tile where that is the kernel's to do."""
    blocks = choice.blocks
    T = 13 if "SLICES" in blocks else max(int8.FEW_TOKENS, blocks["BLOCK_T"]) + 3
    return T, blocks["BLOCK_N"] + 5, 2 * blocks["BLOCK_K"] * blocks.get("SLICES", 1) + 32


@pytest.mark.parametrize(("kernel", "choice"), INT8_TILES)
def test_integer_sums_are_exact_in_every_tile(kernel: Tiles, choice: Tile) -> None:
    choose(kernel, choice)
    T, N, K = ragged(kernel, choice)
    a, b, a_scale, b_scale, bias = codes(T, K, low=-127), codes(N, K), torch.rand(T), torch.rand(N), torch.randn(N)
    a[1], b[2] = 127, -128  # sums of more than a float32's 24 bits
    b[3] = 127 - torch.arange(K) % 2
    result = int8.int8_gemm(a, b, a_scale, b_scale, bias, torch.float32)
    assert torch.equal(result, reference.int8_gemm(a, b, a_scale, b_scale, bias, torch.float32, CANONICAL))


@pytest.mark.parametrize(("kernel", "choice", "dtype"), WEIGHT_TILES)
def test_every_tile_multiplies_every_code(kernel: Tiles, choice: Tile, dtype: torch.dtype) -> None:
    choose(kernel, choice)
    T, N, K = ragged(kernel, choice)
    x = torch.randint(-4, 5, (T, K)).to(dtype)  # so small that sums are exact in any order
    w = torch.arange(N * K).view(N, K).sub(128).to(torch.int8)
    w_scale, bias = torch.rand(N), torch.randn(N).to(dtype)
    result = int8.gemm_int8_weight(x, w, w_scale, bias)
    assert torch.equal(result, reference.gemm_int8_weight(x.float(), w, w_scale, bias.float(), CANONICAL).to(dtype))


def test_the_longest_sums_fit() -> None:
    K = 131_072
    a, ends = torch.full((1, K), 127, dtype=torch.int8), torch.tensor([-128, 127], dtype=torch.int8)
    b, ones = ends[:, None].expand(2, K), torch.ones(2)
    result = int8.int8_gemm(a, b, ones[:1], ones, None, torch.float32)
    assert torch.equal(result, reference.int8_gemm(a, b, ones[:1], ones, None, torch.float32, CANONICAL))


@pytest.mark.parametrize("T", [3, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(T: int, value: float) -> None:
    x, w, w_scale = torch.randn(T, 48, dtype=torch.bfloat16), codes(5, 48), torch.rand(5)
    clean = int8.gemm_int8_weight(x, w, w_scale, None)
    x[2, 7] = value
    result = int8.gemm_int8_weight(x, w, w_scale, None)
    others = torch.arange(T) != 2
    assert torch.equal(result[others], clean[others])
    assert not result[2].isfinite().any()


@pytest.mark.parametrize("T", [2, 20])
def test_rows_may_lie_and_end_anywhere(T: int) -> None:
    N, K = 6, 41
    scales = torch.rand(T), torch.rand(N)
    aligned, w = codes(T, K, low=-127), codes(N, K)
    expected = int8.int8_gemm(aligned, w, *scales, None, torch.float32)
    a = torch.zeros(T, 64, dtype=torch.int8)[:, 3 : 3 + K].copy_(aligned)
    b = torch.zeros(K, N, dtype=torch.int8).T.copy_(w)
    assert torch.equal(int8.int8_gemm(a, b, *scales, None, torch.float32), expected)
    assert torch.equal(expected, reference.int8_gemm(a, b, *scales, None, torch.float32, CANONICAL))


@pytest.mark.parametrize("programs", [0, 1, 7, 64, 191, 192, 5000])
@pytest.mark.parametrize("K", [0, 16, 512, 4096, 11008, 131_072])
@pytest.mark.parametrize("step", [32, 512])
def test_splits_share_all_features_and_none_is_idle(programs: int, K: int, step: int) -> None:
    splits, span = int8._splits(programs, K, step)
    assert span % step == 0
    assert splits == 1 or (splits - 1) * span < K
    assert splits * span >= K
    assert splits == 1 or splits * programs <= int8.PROGRAMS
