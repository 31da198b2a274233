"""Quantization where bits are decided: at every midpoint of many books, at scales whose reciprocals are subnormal or overflow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS, book_tensor, dynamic_map
from q_core.reference import quantize as reference
from q_triton import quantize, tiles
from q_triton.four_bit_tables import four_bit_table
from q_triton.kernels.search import encode_4bit, nearest, nearest_by_table
from q_triton.launch import launch
from q_triton.targets import target_of
from q_triton.tiles import tile

INFINITY = torch.tensor(torch.inf)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# With the bits that a place in a bucket of its search table has; 0 where no table can serve the book.
BOOKS: dict[str, tuple[Tensor, int]] = {
    "signed": (dynamic_map(signed=True), 17),
    "unsigned": (dynamic_map(signed=False), 16),
    "even": (torch.linspace(-1, 1, 256), 17),
    "smallest": (torch.tensor([0.0, 1.0]), 17),
    "off centre": (torch.tensor([-0.3, 0.0, 0.9]), 17),
    "beyond one": (torch.tensor([-1e38, -3.0, -1.5, 0.0, 0.5, 1.5, 3e38]), 17),
    "a midpoint at one": (torch.tensor([-1.25, -0.75, 0.0, 0.75, 1.25]), 17),
    "two zeros": (torch.tensor([-1.0, -0.0, 0.0, 1.0]), 17),
    "an entry thrice": (torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0]), 0),
    "subnormal": (torch.tensor([0.0, 1e-45, 3e-45, 1.0]), 0),
    "close together": (torch.rand(255, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).sort().values, 0),
}


@pytest.fixture(autouse=True)
def _a_table_is_one_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's time is that of programs, whatever their size."""
    monkeypatch.setattr(tiles, "_tuned", {})
    tiles.use_tuned(target_of(torch.device("cpu")).name, {"search_table": (tile(BLOCK=1 << 15),)})
    yield
    tiles._source.cache_clear()


def around(points: Tensor) -> Tensor:
    """The points and their neighbours."""
    return torch.cat((points, torch.nextafter(points, INFINITY), torch.nextafter(points, -INFINITY)))


def critical(book: Tensor) -> Tensor:
    """Numbers from -1 to 1 about everything that a search of the book compares with, and some of any magnitude."""
    spread = (torch.rand(1000) * 2 - 1) * torch.exp(torch.randn(1000) * 6 - 6)
    points = torch.cat((book, (book[:-1] + book[1:]) / 2, torch.arange(-16, 17) / 16, torch.zeros(1)))
    return torch.cat((around(points), -torch.zeros(1), spread)).clamp(-1, 1)


@triton.jit
def search_kernel(x, book, table, bisected, looked_up, n, entries, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < n, 0.0)
    tl.store(bisected + at, nearest(value, book, entries), at < n)
    place_bits = tl.load(table)
    if place_bits > 0:
        tl.store(looked_up + at, nearest_by_table(value, table, place_bits), at < n)


@pytest.mark.parametrize("name", BOOKS)
def test_the_nearest_entry_of_any_book(name: str) -> None:
    book, place_bits = BOOKS[name]
    table = quantize.search_table(book)
    assert table[0] == place_bits
    # What is rounded up to more than 1 counts as 1; only the table's look sees it.
    inside, beyond = critical(book), torch.nextafter(torch.ones(1), INFINITY)
    x = torch.cat((inside, beyond, -beyond))
    bisected, looked_up = torch.empty(2, x.numel(), dtype=torch.int32)
    launch(
        search_kernel, (triton.cdiv(x.numel(), 1024),), tile(BLOCK=1024),
        x=x, book=book, table=table, bisected=bisected, looked_up=looked_up, n=x.numel(), entries=book.numel(),
    )  # fmt: skip
    assert torch.equal(bisected[: inside.numel()], reference.nearest(inside, book))
    if place_bits:
        assert torch.equal(looked_up, reference.nearest(x.clamp(-1, 1), book))


@triton.jit
def encode_kernel(x, table, packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    value = tl.load(x + row * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    pairs = encode_4bit(value, table, ROWS, COLUMNS)
    tl.store(packed + row * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :], pairs)


@pytest.mark.parametrize("quant_type", FOUR_BIT_BOOKS)
def test_the_nearest_code_of_a_4bit_type(quant_type: str) -> None:
    ordered = torch.tensor(FOUR_BIT_BOOKS[quant_type].ordered)
    book = book_tensor(quant_type, torch.device("cpu"))[ordered]
    x = torch.cat((critical(book), torch.linspace(-1.99, 1.99, 500)))
    x = torch.nn.functional.pad(x, (0, 2048 - x.numel()))
    packed = torch.empty(1024, dtype=torch.uint8)
    table = four_bit_table(quant_type, x.device)
    launch(encode_kernel, (1,), tile(), x=x, table=table, packed=packed, ROWS=64, COLUMNS=32)
    expected = ordered[reference.nearest(x, book)].view(-1, 2)
    assert torch.equal(packed, (expected[:, 0] << 4 | expected[:, 1]).to(torch.uint8))


def of_every_scale(dtype: torch.dtype) -> Tensor:
    """Blocks of 64 whose largest magnitudes go from the smallest number of the dtype to the largest, and what isn't finite."""
    info = torch.finfo(dtype)
    largest = torch.tensor(info.max)
    smallest = info.smallest_normal
    scales = torch.tensor([0.0, info.smallest_normal * info.eps, smallest / 64, smallest / 3, smallest, 3.7e-37, 1.0, 2.0**126])
    scales = torch.cat((around(scales.clamp(0, info.max))[: 3 * 8], largest[None])).abs()
    x = (torch.rand(scales.numel(), 64) * 2 - 1) * scales[:, None]
    x[:, 17] = -scales
    odd = torch.rand(5, 64)
    odd[0, 3], odd[1, 5], odd[2, 7], odd[3, 1], odd[3, 2] = torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf
    return torch.cat((x, odd, x)).to(dtype)


def assert_equal(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("table_from", [0, 1 << 30], ids=["table", "bisected"])
@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("name", ["signed", "close together", "a midpoint at one"])
def test_blocks_of_every_scale(
    name: str, blocksize: int, table_from: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "TABLE_FROM", table_from)
    x, book = of_every_scale(dtype), BOOKS[name][0]
    assert_equal(quantize.quantize_blockwise(x, book, blocksize), reference.quantize_blockwise(x, book, blocksize))


def test_a_table_is_the_same_in_any_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    book = dynamic_map(signed=True)
    whole = quantize.search_table(book)
    monkeypatch.setattr(tiles, "_tuned", {})
    tiles._source.cache_clear()
    assert torch.equal(quantize.search_table(book), whole)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", FOUR_BIT_BOOKS)
def test_4bit_blocks_of_every_scale(quant_type: str, dtype: torch.dtype) -> None:
    x = of_every_scale(dtype)
    for part in (x, x[:8], x[:1, :9], x[24:]):  # the largest absmax of a part is another
        arguments = (part, FOUR_BIT_BOOKS[quant_type].blocksizes[0], quant_type)
        assert_equal(quantize.quantize_4bit(*arguments), reference.quantize_4bit(*arguments))


def test_the_largest_absmax_of_more_tiles_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "PARTS", 4)
    for place in (0, 30000, 39999):
        x = torch.randn(40000)
        x[place] = 50.0
        assert_equal(quantize.quantize_4bit(x, 16, "nvfp4"), reference.quantize_4bit(x, 16, "nvfp4"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 1e-38, 0.5, 6.0])
def test_rows_of_every_scale(threshold: float, dtype: torch.dtype) -> None:
    for x in (of_every_scale(dtype), torch.randn(3, 9000).to(dtype)):
        assert_equal(quantize.quantize_int8_rowwise(x, threshold), reference.quantize_int8_rowwise(x, threshold))
