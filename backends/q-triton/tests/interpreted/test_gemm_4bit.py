"""Products with 4-bit weights against float64: every tile that a table has, every way through the host function, rows that fit nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.layouts import CANONICAL
from q_core.reference import gemm as reference
from q_core.specs import bounds
from q_triton import gemm, quantize, tiles
from q_triton.environment import interpreted_target
from q_triton.launch import recorded
from q_triton.targets import compiling_for, target_of
from q_triton.tiles import Tile, Tiles, tile

for name in ("q_cuda", "q_rocm", "q_xpu"):
    importlib.import_module(f"{name}.tiles")

OF_MATRICES = (gemm.GEMM_4BIT, gemm.GEMM_4BIT_FLOAT32)
OF_ONE_TOKEN = tile(BLOCK_N=16, BLOCK_K=256, PROGRAMS=1, warps=2, stages=2)
Choose = Callable[[Tiles, Tile], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Choose]:
    """Lets a kernel have a tile, whatever a call's size."""
    table: dict[str, tuple[Tile, ...]] = {}
    monkeypatch.setitem(tiles._tuned, interpreted_target() or "", table)

    def choose(kernel: Tiles, chosen: Tile) -> None:
        table[kernel.kernel] = (chosen,)
        tiles._source.cache_clear()

    yield choose
    tiles._source.cache_clear()


def call(
    T: int, N: int, K: int, *, dtype: torch.dtype = torch.bfloat16, quant_type: str = "nf4", blocksize: int = 64, bias: bool = True
) -> dict[str, Any]:
    return {
        "x_TK": torch.randn(T, K, dtype=dtype), "packed": torch.randint(256, ((N * K + 1) // 2,), dtype=torch.uint8),
        "absmax": torch.rand(-(-N * K // blocksize)) * 2, "blocksize": blocksize, "quant_type": quant_type, "shape": [N, K],
        "bias": torch.randn(N, dtype=dtype) if bias else None, "activations": "native", "layout": CANONICAL,
    }  # fmt: skip


def check(arguments: dict[str, Any]) -> None:
    wide = {name: arguments[name].double() for name in ("x_TK", "bias") if arguments[name] is not None}
    expected = reference.gemm_4bit(**arguments | wide)
    result = gemm.gemm_4bit(**arguments)
    assert result.dtype is arguments["x_TK"].dtype
    assert result.shape == expected.shape
    assert ((result.double() - expected).abs() <= bounds.gemm_4bit(arguments, expected)).all()


def tokens_of(chosen: Tile) -> tuple[int, ...]:
    """Tokens that fill a tile, and that don't."""
    return (chosen.blocks["BLOCK_T"], chosen.blocks["BLOCK_T"] // 2 + 3)


@pytest.mark.parametrize(
    ("kernel", "chosen"),
    [(kernel, chosen) for kernel in OF_MATRICES for chosen in kernel.known() if chosen != gemm.DECODE_FIRST],
    ids=lambda value: value.kernel if isinstance(value, Tiles) else "-".join(map(str, value.blocks.values())),
)
def test_every_tile(kernel: Tiles, chosen: Tile, choose: Choose) -> None:
    choose(kernel, chosen)
    dtype = torch.float32 if kernel is gemm.GEMM_4BIT_FLOAT32 else torch.bfloat16
    for T, blocksize, quant_type in zip(tokens_of(chosen), (64, 32), ("nf4", "mxfp4"), strict=True):
        # More rows than a block of them; a last block of K that isn't full, in a last part that has fewer blocks than the others.
        K = 7 * chosen.blocks["BLOCK_K"] + blocksize
        check(call(T, chosen.blocks["BLOCK_N"] + 6, K, dtype=dtype, blocksize=blocksize, quant_type=quant_type))


@pytest.mark.parametrize("chosen", gemm.DECODE_4BIT.known())
def test_every_tile_that_decodes_into_memory(chosen: Tile, choose: Choose) -> None:
    choose(gemm.DECODE_4BIT, chosen)
    choose(gemm.GEMM_4BIT, gemm.DECODE_FIRST)
    for K in (chosen.blocks["BLOCK_K"] + 32, chosen.blocks["BLOCK_K"] + 5):
        check(call(3, chosen.blocks["BLOCK_N"] + 3, K))


@pytest.mark.parametrize("chosen", gemm.GEMV_4BIT.known())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_tile_of_one_token(chosen: Tile, dtype: torch.dtype, choose: Choose) -> None:
    choose(gemm.GEMV_4BIT, Tile({**chosen.blocks, "PROGRAMS": 1}, chosen.warps, chosen.stages))
    check(call(1, chosen.blocks["BLOCK_N"] + 3, 2 * chosen.blocks["BLOCK_K"] + 64, dtype=dtype))


@pytest.mark.parametrize("quant_type", FOUR_BIT_BOOKS)
@pytest.mark.parametrize("T", [1, 5])
def test_every_format_and_the_smaller_blocksizes(quant_type: str, T: int, choose: Choose) -> None:
    choose(gemm.GEMV_4BIT, OF_ONE_TOKEN)
    for blocksize in FOUR_BIT_BOOKS[quant_type].blocksizes[:4]:
        check(call(T, 5, max(blocksize, 96), quant_type=quant_type, blocksize=blocksize))  # whole blocks a row
        check(call(T, 5, 160, quant_type=quant_type, blocksize=blocksize, bias=False))  # blocks that cross rows


@pytest.mark.parametrize("K", [1, 31, 33, 95, 130, 257])
@pytest.mark.parametrize("quant_type", ["int4", "nvfp4"])
def test_rows_that_start_within_a_byte_or_a_block(K: int, quant_type: str) -> None:
    check(call(3, 7, K, quant_type=quant_type, blocksize=FOUR_BIT_BOOKS[quant_type].blocksizes[0]))


def test_codes_at_an_odd_address() -> None:
    arguments = call(3, 7, 96)
    codes = torch.cat((arguments["packed"].new_zeros(1), arguments["packed"]))
    check(arguments | {"packed": codes[1:]})


def test_codes_and_activations_that_are_not_contiguous() -> None:
    arguments = call(3, 7, 96)
    check(arguments | {"packed": arguments["packed"].repeat_interleave(2)[::2], "x_TK": torch.randn(96, 6).bfloat16().T[::2]})


@pytest.mark.parametrize(("T", "N", "K"), [(0, 4, 64), (3, 0, 64), (3, 4, 0), (1, 4, 0), (300, 4, 0)])
def test_nothing_to_multiply_gives_the_bias(T: int, N: int, K: int, choose: Choose) -> None:
    choose(gemm.GEMV_4BIT, OF_ONE_TOKEN)
    check(call(T, N, K))


def kernels_of(T: int, N: int, K: int, **options: Any) -> list[str]:
    seen: list[str] = []
    target = target_of(torch.device("cpu"))
    with compiling_for(target), recorded(lambda launch: seen.append(launch.kernel.__name__)):
        arguments = call(T, 1, 64, **options)
        meta = {
            "x_TK": torch.empty(T, K, dtype=arguments["x_TK"].dtype, device="meta"),
            "packed": torch.empty(N * K // 2, dtype=torch.uint8, device="meta"),
            "absmax": torch.empty(N * K // 64, device="meta"), "bias": None, "shape": [N, K],
        }  # fmt: skip
        gemm.gemm_4bit(**arguments | meta)
    return seen


def test_which_kernels_are_launched() -> None:
    """One token of many features without parts, of few in parts; many tokens at the library's product, as are rows that aren't aligned."""
    assert kernels_of(1, 16384, 4096) == ["gemv_4bit_kernel"]
    assert kernels_of(1, 1024, 4096) == ["gemm_4bit_kernel", "sum_parts_kernel"]
    assert kernels_of(16, 4096, 4096) == ["gemm_4bit_kernel", "sum_parts_kernel"]
    assert kernels_of(16, 131072, 4096) == ["gemm_4bit_kernel"]
    assert kernels_of(4096, 4096, 4096) == ["decode_4bit_kernel"]
    assert kernels_of(1, 16384, 4100) == ["decode_4bit_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_rounded_as_int8_codes_hold_them(dtype: torch.dtype, choose: Choose) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    choose(quantize.QUANTIZE_INT8_ROWS, tile(BLOCK_T=2, BLOCK_K=32))
    x = torch.randn(9, 70).to(dtype)
    x[1] = 0
    x[2] *= smallest  # subnormal
    x[3, 69] = torch.inf
    x[4, 3] = torch.nan
    x[5] = torch.arange(-35, 35) / 127 * 2  # codes and halves between them
    x[5, 69] = 1
    x[6] = -1
    assert torch.equal(quantize.round_rows(x).nan_to_num(7), reference.round_rows(x).to(dtype).nan_to_num(7))


def test_int8_activations_on_every_way(choose: Choose) -> None:
    choose(gemm.GEMV_4BIT, OF_ONE_TOKEN)
    for T, K in ((1, 128), (5, 128), (5, 33)):
        check(call(T, 5, K) | {"activations": "int8"})


def test_a_dense_weight_is_torchs_own() -> None:
    x, w, bias = torch.randn(2, 3, 40), torch.randn(5, 40), torch.randn(5)
    assert torch.equal(gemm.gemm(x, w, bias, CANONICAL), torch.nn.functional.linear(x, w, bias))
    assert isinstance(gemm.gemm(x, w, None, CANONICAL), Tensor)
