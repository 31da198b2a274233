"""The matrix products against float64, within the bound of their float32 sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_cpu import gemm
from q_cpu.runtime import native

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps


def assert_within_rounding(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, *, decoded: bool = False) -> None:
    """``out`` is ``x @ w.T + bias`` but for K + 2 float32 roundings of what was summed, and one to its dtype.

    A ``decoded`` weight may have been rounded to bfloat16 to meet activations of bfloat16.
    """
    x64, w64 = x.double(), w.double()
    b64 = torch.zeros(w.shape[0], dtype=torch.float64) if bias is None else bias.double()
    exact = x64 @ w64.T + b64
    summed = x64.abs() @ w64.abs().T + b64.abs()
    finfo = torch.finfo(out.dtype)
    bound = (x.shape[-1] + 2) * EPS32 / 2 * summed
    if decoded and x.dtype is torch.bfloat16:
        bound = bound + finfo.eps / 2 * summed
    bound = bound + finfo.eps / 2 * (exact.abs() + bound) + finfo.smallest_normal * finfo.eps
    assert ((out.double() - exact).abs() <= bound).all()


def weight(N: int, K: int, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random packed codes and absmax, and in float64 what they decode to."""
    generator = torch.Generator().manual_seed(N * 1000 + K)
    packed = torch.randint(0, 256, ((N * K + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-N * K // blocksize), generator=generator) + 0.01
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[: N * K].long()
    book = torch.tensor(FOUR_BIT_BOOKS[quant_type].values, dtype=torch.float32).double()
    return packed, absmax, (book[codes] * absmax.double().repeat_interleave(blocksize)[: N * K]).view(N, K)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 67, 130])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 33), (8, 512), (37, 1029), (65, 250), (66, 264), (70, 1152)])
def test_gemm_4bit(T, N, K, dtype):
    packed, absmax, w = weight(N, K, 64, "nf4")
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(T)).to(dtype)
    bias = torch.randn(N).to(dtype)
    for b in (None, bias):
        out = gemm.gemm_4bit(x, packed, absmax, 64, "nf4", (N, K), b, "native")
        assert out.shape == (T, N)
        assert out.dtype == dtype
        assert_within_rounding(out, x, w, b, decoded=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("T", "N", "K"),
    [
        (300, 200, 1060),  # several blocks of tokens, panels of rows, and panels' widths
        (1, 66, 66_560),  # more features than are put in order at a time
        (8, 66, 9_000),
        (5, 9, 8_320),
    ],
)
def test_gemm_4bit_of_sizes_past_its_blocks(T, N, K, dtype):
    packed, absmax, w = weight(N, K, 64, "fp4")
    x, bias = torch.randn(T, K).to(dtype), torch.randn(N).to(dtype)
    assert_within_rounding(gemm.gemm_4bit(x, packed, absmax, 64, "fp4", (N, K), bias, "native"), x, w, bias, decoded=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", FOUR_BIT_BOOKS)
def test_gemm_4bit_of_every_type_and_blocksize(quant_type, dtype):
    for blocksize in FOUR_BIT_BOOKS[quant_type].blocksizes:
        for T, N, K in ((1, 9, 512), (3, 7, 136), (8, 5, 40), (20, 14, 96), (20, 5, 192), (11, 7, 44)):
            packed, absmax, w = weight(N, K, blocksize, quant_type)
            x = torch.randn(T, K).to(dtype)
            out = gemm.gemm_4bit(x, packed, absmax, blocksize, quant_type, (N, K), None, "native")
            assert_within_rounding(out, x, w, None, decoded=True)


@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    N=st.integers(0, 40),
    K=st.integers(0, 300),
    blocksize=st.sampled_from((16, 32, 64, 128, 4096)),
    quant_type=st.sampled_from(tuple(FOUR_BIT_BOOKS)),
    dtype=st.sampled_from(FLOATS),
    strided=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_gemm_4bit_of_any_shape(leading, N, K, blocksize, quant_type, dtype, strided):
    packed, absmax, w = weight(N, K, blocksize, quant_type)
    x = torch.randn(*leading, 2 * K).to(dtype)
    x = x[..., ::2] if strided else x[..., :K]
    out = gemm.gemm_4bit(x, packed.view(-1, 1), absmax, blocksize, quant_type, (N, K), None, "native")
    assert out.shape == (*leading, N)
    assert out.is_contiguous()
    T = math.prod(leading)
    assert_within_rounding(out.view(T, N), x.reshape(T, K), w, None, decoded=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("K", [1300, 1304, 1344])
def test_a_token_gets_the_same_bits_in_any_batch_of_a_few_and_in_any_of_many(K, dtype):
    N, few = 70, 8
    packed, absmax, _ = weight(N, K, 64, "nf4")
    x = torch.randn(300, K).to(dtype)
    many = gemm.gemm_4bit(x, packed, absmax, 64, "nf4", (N, K), None, "native")
    alone = torch.cat([gemm.gemm_4bit(x[i : i + 1], packed, absmax, 64, "nf4", (N, K), None, "native") for i in range(20)])
    for first, last in ((0, 2), (5, 8), (11, 15), (6, 14), (3, 12), (60, 70), (2, 299)):
        part = gemm.gemm_4bit(x[first:last], packed, absmax, 64, "nf4", (N, K), None, "native")
        assert torch.equal(part, (alone if last - first <= few else many)[first:last])


@pytest.mark.parametrize("T", [6, 12])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_stay_in_their_token(T, dtype):
    packed, absmax, w = weight(16, 104, 64, "nf4")
    x = torch.randn(T, 104).to(dtype)
    x[2, 103] = math.nan
    x[4, 3] = math.inf
    out = gemm.gemm_4bit(x, packed, absmax, 64, "nf4", (16, 104), None, "native")
    assert out[2].isnan().all()
    assert not out[4].isfinite().any()
    rest = [t for t in range(T) if t not in (2, 4)]
    assert_within_rounding(out[rest], x[rest], w, None, decoded=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("T", [1, 5, 12])
@pytest.mark.parametrize("K", [64, 72, 70])
def test_a_poisoned_block_reaches_its_outputs_only(K, T, poison):
    N, blocksize = 16, 32
    packed, absmax, _ = weight(N, K, blocksize, "nf4")
    block = 5 * K // blocksize + 1
    absmax[block] = poison
    rows = torch.arange(N)
    reached = (rows * K < (block + 1) * blocksize) & ((rows + 1) * K > block * blocksize)
    for dtype in FLOATS:
        out = gemm.gemm_4bit(torch.randn(T, K).to(dtype), packed, absmax, blocksize, "nf4", (N, K), None, "native")
        assert not out[:, reached].isfinite().any()
        assert out[:, ~reached].isfinite().all()


def native_gemm(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel, also for sizes at which the op takes torch's product."""
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    native.gemm(x, w, x.shape[0], w.shape[0], x.shape[1], bias, out)
    return out


@pytest.mark.parametrize("function", [gemm.gemm, native_gemm])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 8, 9, 31, 40])
@pytest.mark.parametrize(("N", "K"), [(0, 5), (3, 0), (1, 1), (7, 33), (9, 512), (38, 1029), (12, 2080)])
def test_gemm(N, K, T, dtype, function):
    x, w, bias = torch.randn(T, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    for b in (None, bias):
        out = function(x, w, b)
        assert out.shape == (T, N)
        assert out.dtype == dtype
        assert_within_rounding(out, x, w, b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("T", "N", "K"),
    [
        (300, 400, 1060),  # several blocks of tokens, panels of rows, and panels' widths
        (20, 131, 4_130),  # for few tokens, several blocks of rows, an odd last row, and parts of a row
        (20, 5, 17_000),  # too many features for eight tokens to be kept, but not for two
    ],
)
def test_gemm_of_sizes_past_its_blocks_gives_a_token_the_same_bits_in_any_batch(T, N, K, dtype):
    x, w, bias = torch.randn(T, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)
    whole = native_gemm(x, w, bias)
    assert_within_rounding(whole, x, w, bias)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, T // 2):
        for first in (0, T - tokens):
            assert torch.equal(native_gemm(x[first : first + tokens], w, bias), whole[first : first + tokens])


def test_gemm_of_strided_tensors():
    x, w = torch.randn(3, 4, 40)[..., ::2], torch.randn(20, 9)
    assert_within_rounding(gemm.gemm(x, w.t(), None).view(12, 9), x.reshape(12, 20), w.t(), None)
    assert_within_rounding(gemm.gemm(x, w.t().contiguous(), None).view(12, 9), x.reshape(12, 20), w.t(), None)


def test_other_dtypes_are_declined_in_words():
    for op in (gemm.gemm, gemm.gemm_4bit):
        assert "x_TK is torch.float64" in op.q_accepts(x_TK=torch.empty(1, 1, dtype=torch.float64))
