"""The quantize family: codes bit for bit, at every ISA level, and bitsandbytes' bytes."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS, dynamic_map
from q_cpu import quantize
from q_cpu.runtime import native

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = (32, 64, 256, 4096)
TINY = torch.finfo(torch.float32).smallest_normal


def books() -> dict[str, Tensor]:
    """Ascending books: the two maps, and ones that the fast search was not made for."""
    generator = torch.Generator().manual_seed(0)
    return {
        "signed": dynamic_map(signed=True),
        "unsigned": dynamic_map(signed=False),
        "random": torch.rand(256, generator=generator).mul(2).sub(1).sort().values,
        "uneven": torch.randn(97, generator=generator).mul(5).tanh().sort().values,
        "crowded": torch.linspace(-1e-9, 1e-9, 200),
        "repeated": torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.5, 0.5, 1.0]),
        "two": torch.tensor([-0.25, 0.75]),
    }


def adversarial(book: Tensor) -> Tensor:
    """Scaled values where a search goes wrong: entries, midpoints, both neighbours of each, zeros, and the ends of binades."""
    midpoints = (book[:-1] + book[1:]) / 2
    binades = torch.tensor([2.0**-e for e in range(150)])
    values = torch.cat([book, midpoints, binades, -binades, torch.tensor([0.0, -0.0])])
    infinity = torch.tensor(math.inf)
    values = torch.cat([values, torch.nextafter(values, infinity), torch.nextafter(values, -infinity)])
    return values[values.abs() <= 1]


def in_blocks_of_absmax_one(values: Tensor, blocksize: int) -> Tensor:
    """A tensor whose blocks each begin with 1, so that the values are their own scaled values."""
    rows = -(-values.numel() // (blocksize - 1))
    padded = torch.zeros(rows * (blocksize - 1))
    padded[: values.numel()] = values
    return torch.cat([torch.ones(rows, 1), padded.view(rows, blocksize - 1)], dim=1)


def four_bit_book(quant_type: str) -> tuple[Tensor, Tensor]:
    """Ascending values of a 4-bit type, and their codes."""
    book = FOUR_BIT_BOOKS[quant_type]
    ordered = torch.tensor(book.ordered)
    return torch.tensor(book.values)[ordered], ordered.to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)


def mixed_magnitudes(seed: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-20, 20, shape[:1] + (1,) * (len(shape) - 1), generator=generator)
    )


def outcome(A: Tensor, name: str, blocksize: int, encode_blocks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, absmax = quantize.quantize_blockwise(A, books()[name], blocksize)
    return codes.view(-1), absmax, *encode_blocks(A, books()[name], blocksize)


@pytest.mark.parametrize("name", books())
def test_codes_are_exact_on_adversarial_values(name, encode_blocks):
    A = in_blocks_of_absmax_one(adversarial(books()[name]), 256)
    codes, _, expected, _ = outcome(A, name, 256, encode_blocks)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_codes_are_exact_on_two_million_values(name, dtype, encode_blocks):
    A = mixed_magnitudes(1, (2048, 1024)).to(dtype)
    A = A.where(A.isfinite(), 0)  # what float16 can't hold
    codes, absmax, expected, expected_absmax = outcome(A, name, 256, encode_blocks)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("scale", [1e-45, 1e-41, TINY / 2, TINY, 3e38])
def test_codes_are_exact_at_the_ends_of_the_range(scale, encode_blocks):
    A = (torch.rand(64, 256, generator=torch.Generator().manual_seed(2)) * 2 - 1) * scale
    codes, absmax, expected, expected_absmax = outcome(A, "signed", 64, encode_blocks)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, expected_absmax)


def test_every_float16_and_bfloat16_is_read_right(encode_blocks):
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(65536).to(torch.uint16).view(torch.int16).view(dtype)
        every = every[every.isfinite()]
        codes, absmax, expected, expected_absmax = outcome(every, "signed", 32, encode_blocks)
        assert torch.equal(codes, expected)
        assert torch.equal(absmax, expected_absmax)


def power_of_two_scales(absmax: Tensor) -> Tensor:
    """6 * 2^e, the smallest that is not below, by rational numbers."""

    def scale(x: float) -> float:
        e = -127
        while e < 125 and 6 * Fraction(2) ** e < Fraction(x):
            e += 1
        return float(6 * Fraction(2) ** e)

    return torch.tensor([scale(x) if 0 < x < math.inf else x for x in absmax.tolist()])


def e4m3_scales(absmax: Tensor) -> Tensor:
    """6 * t * d, with d in torch's own E4M3."""
    counted = absmax[absmax.isfinite()]
    t = (counted.max() if counted.numel() else torch.tensor(0.0)) / torch.tensor(2688.0)
    d = (absmax / (6 * t if t > 0 else 1)).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
    return torch.where((absmax > 0) & absmax.isfinite(), 6 * (t * d), absmax)


SCALES = {"absmax": lambda absmax: absmax, "e8m0": power_of_two_scales, "e4m3": e4m3_scales}
FOUR_BIT_CASES = [
    (name, size) for name, book in FOUR_BIT_BOOKS.items() for size in book.blocksizes if size in (16, 32, 64, 256, 4096)
]


@pytest.mark.parametrize(("quant_type", "blocksize"), FOUR_BIT_CASES)
def test_4bit_codes_are_exact(quant_type, blocksize, encode_blocks):
    values, ordered = four_bit_book(quant_type)
    tiny = (torch.rand(64, 256, generator=torch.Generator().manual_seed(2)) * 2 - 1) * torch.exp2(torch.linspace(-149, 127, 64))[
        :, None
    ]
    poisoned = mixed_magnitudes(5, (64, 100))
    poisoned[3, 7], poisoned[20, 50], poisoned[40] = math.nan, -math.inf, 0
    for A in (
        in_blocks_of_absmax_one(adversarial(values), blocksize),
        mixed_magnitudes(3, (300, 1000)),
        mixed_magnitudes(4, (64, 64)).bfloat16(),
        mixed_magnitudes(6, (33, 65)).clamp(-6e4, 6e4).half(),
        tiny,
        poisoned,
        torch.zeros(100),
    ):
        packed, absmax = quantize.quantize_4bit(A, blocksize, quant_type)
        expected, expected_absmax = encode_blocks(A, values, blocksize, SCALES[FOUR_BIT_BOOKS[quant_type].scale])
        torch.testing.assert_close(absmax, expected_absmax, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(unpack(packed)[: A.numel()], ordered[expected.long()])


@pytest.mark.parametrize(("quant_type", "blocksize"), FOUR_BIT_CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_4bit_codes_are_decoded_exactly(quant_type, blocksize, dtype):
    for numel in (1, 31, 64, 100, 4096, 12345):
        packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8)
        absmax = torch.randn(-(-numel // blocksize)).abs() * torch.exp2(torch.randint(-140, 120, (-(-numel // blocksize),)))
        values = torch.tensor(FOUR_BIT_BOOKS[quant_type].values)[unpack(packed)[:numel].long()]
        expected = (values * absmax.repeat_interleave(blocksize)[:numel]).to(dtype)
        assert torch.equal(quantize.dequantize_4bit(packed, absmax, blocksize, quant_type, (numel,), dtype), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_outputs_are_decoded_the_same(dtype):
    """Beyond the size from which results are written past the caches; in part, and from the middle of a vector on."""
    numel = (1 << 24) // dtype.itemsize + 4096 + 37
    codes = torch.randint(0, 256, (numel,), dtype=torch.uint8)
    absmax = torch.rand(-(-numel // 32))
    for offset in (0, 3):
        out = torch.full((numel + offset,), -1.0, dtype=dtype)
        native.dequantize_4bit(codes[: (numel + 1) // 2], absmax, 32, "nf4", out[offset:])
        starts = (0, numel // 2 & ~63, (numel - 69) & ~63)
        for start in starts:
            part = quantize.dequantize_4bit(codes[start // 2 : start // 2 + 19], absmax[start // 32 :][:2], 32, "nf4", (37,), dtype)
            assert torch.equal(out[offset + start :][:37], part)
        native.dequantize_blockwise(codes, absmax, books()["signed"], 32, out[offset:])
        for start in starts:
            part = quantize.dequantize_blockwise(codes[start : start + 37], absmax[start // 32 :][:2], books()["signed"], 32, dtype)
            assert torch.equal(out[offset + start :][:37], part)


@pytest.mark.parametrize("count", [1, 31, 63, 65, 129, 255, 4095])
def test_an_odd_count_is_padded_with_the_code_of_zero(count):
    for quant_type, book in FOUR_BIT_BOOKS.items():
        packed, _ = quantize.quantize_4bit(torch.randn(count), book.blocksizes[0], quant_type)
        assert packed.shape == ((count + 1) // 2,)
        assert packed[-1] & 15 == book.zero_code


def test_zero_is_zero():
    for name in ("signed", "unsigned"):
        book = books()[name]
        A = torch.cat([torch.zeros(256), torch.randn(256), -torch.zeros(32)])
        A[300] = 0
        codes, absmax = quantize.quantize_blockwise(A, book, 256)
        decoded = quantize.dequantize_blockwise(codes, absmax, book, 256, torch.float32)
        assert (decoded[A == 0] == 0).all()
        assert absmax[0] == 0
    for quant_type, four_bit in FOUR_BIT_BOOKS.items():
        packed, _ = quantize.quantize_4bit(torch.zeros(101), four_bit.blocksizes[0], quant_type)
        assert (unpack(packed) == four_bit.zero_code).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_non_finite_value_poisons_its_block_and_no_other(poison, dtype):
    A = torch.randn(192).to(dtype)
    A[70] = poison
    book = books()["signed"]
    codes, absmax = quantize.quantize_blockwise(A, book, 64)
    packed, absmax4 = quantize.quantize_4bit(A, 64, "nf4")
    for found in (absmax, absmax4):
        assert found[1].isnan() if math.isnan(poison) else found[1] == math.inf
    assert (codes[64:128] == 127).all()
    assert (unpack(packed)[64:128] == 7).all()
    for decoded in (
        quantize.dequantize_blockwise(codes, absmax, book, 64, dtype),
        quantize.dequantize_4bit(packed, absmax4, 64, "nf4", (192,), dtype),
    ):
        assert decoded[64:128].isnan().all()
        assert decoded[:64].isfinite().all()
        assert decoded[128:].isfinite().all()


def test_nan_wins_over_infinity():
    A = torch.tensor([1.0, math.inf, math.nan, -math.inf])
    assert quantize.quantize_blockwise(A, books()["signed"], 32)[1].isnan()
    assert quantize.quantize_4bit(A, 32, "fp4")[1].isnan()
    assert quantize.quantize_int8_rowwise(A[None], 0.0)[1].isnan()


@pytest.mark.parametrize("dtype", FLOATS)
def test_decoding_rounds_once(dtype):
    """Products over the whole range of each dtype, subnormals and overflow included."""
    book = books()["signed"]
    codes = torch.arange(256, dtype=torch.uint8).repeat(512)
    absmax = torch.exp2(torch.linspace(-149, 127, 512)) * 1.37
    expected = (book[codes.long()].view(512, 256) * absmax[:, None]).view(-1).to(dtype)
    decoded = quantize.dequantize_blockwise(codes, absmax, book, 256, dtype)
    assert torch.equal(decoded, expected)

    packed = torch.arange(256, dtype=torch.uint8).repeat(512)
    values = torch.tensor(FOUR_BIT_BOOKS["nf4"].values)[unpack(packed).long()]
    expected = (values.view(512, 512) * absmax[:, None]).to(dtype)
    decoded = quantize.dequantize_4bit(packed, absmax, 512, "nf4", (512, 512), dtype)
    assert torch.equal(decoded, expected)


def test_decoding_nan_and_ties_to_16_bits():
    """Every float32 pattern's upper half with lower halves around the ties; the book's 1 times absmax is absmax."""
    upper = torch.arange(65536, dtype=torch.int64) << 16
    patterns = torch.cat([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000)])
    absmax = patterns.to(torch.int32).view(torch.float32)
    codes = torch.ones(absmax.numel(), dtype=torch.uint8).repeat_interleave(32)[: absmax.numel() * 32]
    for dtype in (torch.bfloat16, torch.float16):
        decoded = quantize.dequantize_blockwise(codes, absmax, torch.tensor([0.0, 1.0]), 32, dtype).view(-1, 32)
        expected = absmax.to(dtype)
        for column in (0, 31):  # by vector and alone
            same = (decoded[:, column] == expected) | (decoded[:, column].isnan() & expected.isnan())
            assert same.all()
        tail = quantize.dequantize_blockwise(codes[:1], absmax[:1], torch.tensor([0.0, 1.0]), 32, dtype)
        assert torch.equal(tail, expected[:1])


def test_a_code_beyond_a_short_book_reads_no_foreign_memory():
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = quantize.dequantize_blockwise(codes, torch.ones(1), torch.tensor([1.0, 2.0]), 256, torch.float32)
    assert decoded.tolist() == [1.0, 2.0] + [0.0] * 254


def rowwise_oracle(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    x = A.float()
    magnitude = x.abs()
    outlier = magnitude >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    columns = outlier.reshape(math.prod(x.shape[:-1]), x.shape[-1]).any(0)
    counted = magnitude.masked_fill(outlier, 0)
    absmax = counted.amax(-1) if x.shape[-1] else torch.zeros(x.shape[:-1])
    absmax = torch.where(counted.isnan().any(-1), torch.nan, absmax)
    scale = torch.tensor(127.0) / absmax  # a Python number would be multiplied with the reciprocal: two roundings
    kept = x.masked_fill(columns, 0)
    q = torch.where(scale.isinf()[..., None], (kept / absmax[..., None] * 127).round(), (kept * scale[..., None]).round())
    dead = (absmax == 0) | ~absmax.isfinite()
    return q.clamp(-127, 127).masked_fill(dead[..., None], 0).to(torch.int8), absmax, columns


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_rows_are_exact(threshold, dtype):
    A = torch.randn(96, 1000, generator=torch.Generator().manual_seed(5)).to(dtype)
    A[:, 17] *= 20
    A[3] = 0
    A[4] *= 1e-7
    A[5, 100] = math.nan
    A[6, 101] = math.inf
    A[7] = torch.arange(1000).to(dtype).div(8) - 60
    A[8] = torch.randint(-254, 255, (1000,)).to(dtype) / 2  # with absmax 127, ties
    A[8, 0] = 127
    for found, expected in zip(quantize.quantize_int8_rowwise(A, threshold), rowwise_oracle(A, threshold), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 2e-37, 3e-37, 4e-37, TINY, 3e38])
def test_int8_rows_are_exact_at_the_ends_of_the_range(scale):
    A = (torch.rand(16, 999, generator=torch.Generator().manual_seed(6)) * 2 - 1) * scale
    for found, expected in zip(quantize.quantize_int8_rowwise(A, 0.0), rowwise_oracle(A, 0.0), strict=True):
        assert torch.equal(found, expected)


@given(
    shape=st.lists(st.integers(0, 70), min_size=1, max_size=3).filter(lambda shape: math.prod(shape) < 20000),
    dtype=st.sampled_from(FLOATS),
    blocksize=st.sampled_from(BLOCKSIZES),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_strides(shape, dtype, blocksize, strided, seed, encode_blocks):
    A = torch.randn([2 * n for n in shape], generator=torch.Generator().manual_seed(seed)).to(dtype)
    A = A[tuple(slice(0, 2 * n, 2) if strided else slice(n) for n in shape)].movedim(0, -1)
    book = books()["signed"]

    codes, absmax = quantize.quantize_blockwise(A, book, blocksize)
    expected, expected_absmax = encode_blocks(A, book, blocksize)
    assert codes.shape == A.shape
    assert codes.is_contiguous()
    assert torch.equal(codes.view(-1), expected)
    assert torch.equal(absmax, expected_absmax)
    decoded = quantize.dequantize_blockwise(codes.movedim(-1, 0), absmax, book, blocksize, dtype)
    assert decoded.shape == codes.movedim(-1, 0).shape
    assert decoded.is_contiguous()

    packed, absmax4 = quantize.quantize_4bit(A, blocksize, "fp4")
    values, ordered = four_bit_book("fp4")
    expected, _ = encode_blocks(A, values, blocksize)
    assert torch.equal(unpack(packed)[: A.numel()], ordered[expected.long()])
    decoded = quantize.dequantize_4bit(packed, absmax4, blocksize, "fp4", A.shape, dtype)
    assert decoded.shape == A.shape
    scales = absmax4.repeat_interleave(blocksize)[: A.numel()]
    assert torch.equal(
        decoded.view(-1), (torch.tensor(FOUR_BIT_BOOKS["fp4"].values)[unpack(packed)[: A.numel()].long()] * scales).to(dtype)
    )

    for found, wanted in zip(quantize.quantize_int8_rowwise(A, 1.5), rowwise_oracle(A, 1.5), strict=True):
        assert found.shape == wanted.shape
        assert torch.equal(found, wanted)


def test_a_scalar_has_one_block():
    codes, absmax = quantize.quantize_blockwise(torch.tensor(-3.0), books()["signed"], 256)
    assert codes.shape == ()
    assert absmax.tolist() == [3.0]
    packed, absmax = quantize.quantize_4bit(torch.tensor(3.0), 64, "nf4")
    assert quantize.dequantize_4bit(packed, absmax, 64, "nf4", (), torch.float32) == 3.0


def test_bitsandbytes_makes_the_same_bytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="the peer, bitsandbytes, is not installed")
    A = torch.randn(512, 512, generator=torch.Generator().manual_seed(7))
    theirs, state = functional.quantize_4bit(A, blocksize=64, quant_type="nf4")
    packed, absmax = quantize.quantize_4bit(A, 64, "nf4")
    assert torch.equal(packed, theirs.view(-1))
    assert torch.equal(absmax, state.absmax)
    decoded = quantize.dequantize_4bit(packed, absmax, 64, "nf4", A.shape, torch.float32)
    assert torch.equal(decoded, functional.dequantize_4bit(theirs, state))


def test_float64_is_declined_in_words():
    double = torch.randn(64, dtype=torch.float64)
    for function, arguments in (
        (quantize.quantize_blockwise, {"A": double}),
        (quantize.quantize_4bit, {"A": double}),
        (quantize.quantize_int8_rowwise, {"A_TK": double}),
        (quantize.dequantize_blockwise, {"dtype": torch.float64}),
        (quantize.dequantize_4bit, {"dtype": torch.int32}),
    ):
        assert "only float32, bfloat16 and float16" in function.q_accepts(**arguments)
