"""The products with int8: int8 rows bit for bit, int8 weights and int8 activations against float64 within their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.reference import gemm as reference
from q_core.reference import quantize as reference_quantize
from q_core.specs import bounds
from q_core.testing.agreement import compare
from q_cpu import gemm, int8

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def int8_oracle(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    sums = (a.double() @ b.double().T).to(torch.int32).float()  # exact: below 2^53
    out = sums * (a_scale[..., None] * b_scale * torch.tensor(1 / 16129, dtype=torch.float32))
    return (out if bias is None else out + bias.float()).to(dtype)


@given(
    leading=st.lists(st.integers(0, 7), min_size=0, max_size=2),
    N=st.integers(0, 40),
    K=st.integers(0, 200),
    dtype=st.sampled_from(FLOATS),
    bias_dtype=st.sampled_from((None, *FLOATS)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_int8_gemm_is_exact(leading, N, K, dtype, bias_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (*leading, K), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (K, N), dtype=torch.int8, generator=generator).t()
    a_scale, b_scale = torch.rand(leading, generator=generator), torch.rand(N, generator=generator)
    bias = None if bias_dtype is None else torch.randn(N, generator=generator).to(bias_dtype)
    out = int8.int8_gemm(a, b, a_scale, b_scale, bias, dtype)
    assert out.shape == (*leading, N)
    assert torch.equal(out, int8_oracle(a, b, a_scale, b_scale, bias, dtype))


@pytest.mark.parametrize("T", [1, 5])
def test_int8_gemm_holds_the_largest_sums(T):
    K = 131071
    a = torch.tensor([[127], [-128]] * T, dtype=torch.int8).repeat(1, K)
    b = torch.tensor([[127], [-128], [-127]], dtype=torch.int8).repeat(1, K)
    ones = torch.ones(2 * T)
    out = int8.int8_gemm(a, b, ones, torch.ones(3), None, torch.float32)
    sums = torch.tensor([[127 * 127, -127 * 128, -127 * 127], [-128 * 127, 128 * 128, 128 * 127]] * T).double() * K
    assert torch.equal(out, sums.float() * torch.tensor(1 / 16129))
    a = torch.zeros(1, K + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="int8_gemm: a_TK has K = 131072, expected at most 131071"):
        int8.int8_gemm(a, a, ones[:1], ones[:1], None, torch.float32)


TOKENS = (1, 2, 3, 4, 5, 6, 7, 11, 130)
SIZES = ((1, 1), (3, 33), (70, 127), (64, 512), (67, 1029), (130, 700))


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_int8_gemm_at_every_tile(T, N, K):
    generator = torch.Generator().manual_seed(T)
    a, b = (torch.randint(-128, 128, (rows, K), dtype=torch.int8, generator=generator) for rows in (T, N))
    a[:, : K // 2], b[: N // 2] = -128, -128
    a_scale, b_scale = torch.rand(T, generator=generator), torch.rand(N, generator=generator)
    out = int8.int8_gemm(a, b, a_scale, b_scale, None, torch.float32)
    assert torch.equal(out, int8_oracle(a, b, a_scale, b_scale, None, torch.float32))


def int8_weight_call(T: int, N: int, K: int, dtype: torch.dtype, *, biased: bool) -> dict[str, object]:
    generator = torch.Generator().manual_seed(T * 1000 + N + K)
    return {
        "x_TK": torch.randn(T, K, generator=generator).to(dtype),
        "w_NK": torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator),
        "w_scale": torch.rand(N, generator=generator),
        "bias": torch.randn(N, generator=generator).to(dtype) if biased else None,
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_gemm_int8_weight(T, N, K, dtype):
    call = int8_weight_call(T, N, K, dtype, biased=T % 2 == 0)
    out = int8.gemm_int8_weight(**call)
    assert out.shape == (T, N)
    assert out.dtype is dtype
    x, w, scale, bias = call.values()
    exact = x.double() @ (w.double() * scale.double()[:, None] / 127).T + (0 if bias is None else bias.double())
    assert compare(out, exact, bounds.gemm_int8_weight(call, exact)) is None


def test_gemm_int8_weight_of_odd_layouts_and_no_tokens():
    call = int8_weight_call(6, 10, 64, torch.bfloat16, biased=True)
    x, w, scale, bias = call.values()
    expected = int8.gemm_int8_weight(x, w, scale, bias)
    strided = int8.gemm_int8_weight(x.repeat(1, 2).view(6, 2, 64)[:, 1].view(2, 3, 64), w.t().contiguous().t(), scale, bias)
    assert torch.equal(strided, expected.view(2, 3, 10))
    assert int8.gemm_int8_weight(x[:0], w, scale, bias).shape == (0, 10)
    assert torch.equal(int8.gemm_int8_weight(x[:, :0], w[:, :0], scale, bias), bias.expand(6, 10))


@pytest.mark.parametrize("T", [3, 9])
def test_non_finite_activations_stay_in_their_token(T):
    call = int8_weight_call(T, 70, 130, torch.bfloat16, biased=False)
    clean = int8.gemm_int8_weight(**call)
    call["x_TK"][1, 129], call["x_TK"][2, 5] = math.nan, math.inf
    out = int8.gemm_int8_weight(**call)
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, *range(3, T)]], clean[[0, *range(3, T)]])


def four_bit_call(T: int, N: int, K: int, dtype: torch.dtype, quant_type: str, blocksize: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(T * 1000 + N + K)
    return {
        "x_TK": torch.randn(T, K, generator=generator).to(dtype),
        "packed": torch.randint(0, 256, ((N * K + 1) // 2,), dtype=torch.uint8, generator=generator),
        "absmax": torch.rand(-(-N * K // blocksize), generator=generator),
        "blocksize": blocksize,
        "quant_type": quant_type,
        "shape": (N, K),
        "bias": torch.randn(N, generator=generator).to(dtype) if T % 2 else None,
        "activations": "int8",
    }


def assert_rounds_as_promised(call: dict[str, object]) -> None:
    """Activations as ``quantize_int8_rowwise`` rounds them, books to 127ths, sums in float32."""
    out = gemm.gemm_4bit(**call)
    x, bias = call["x_TK"], call["bias"]
    weight = reference.decode_weight(call, torch.float64)
    exact = reference.round_rows(x.double()) @ weight.T + (0 if bias is None else bias.double())
    assert out.dtype is x.dtype
    assert out.is_contiguous()
    assert compare(out, exact, bounds.gemm_4bit(call, exact)) is None


FORMATS = [(name, blocksize) for name, book in FOUR_BIT_BOOKS.items() for blocksize in book.blocksizes]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("quant_type", "blocksize"), FORMATS)
def test_gemm_4bit_of_every_format(quant_type, blocksize, dtype):
    for T in (1, 3, 4, 5, 6, 7, 13):
        assert_rounds_as_promised(
            four_bit_call(T, 67, blocksize if blocksize > 512 else 3 * blocksize, dtype, quant_type, blocksize)
        )


@given(
    T=st.integers(0, 9),
    N=st.integers(0, 70),
    K=st.integers(0, 300),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(FLOATS),
)
@settings(max_examples=60, deadline=None)
def test_gemm_4bit_of_any_shape(T, N, K, format, dtype):
    assert_rounds_as_promised(four_bit_call(T, N, K, dtype, *format))


@pytest.mark.parametrize("T", [1, 130, 131])
def test_gemm_4bit_with_large_features(T):
    assert_rounds_as_promised(four_bit_call(T, 66, 2304, torch.float32, "nf4", 64))
    assert_rounds_as_promised(four_bit_call(T, 5, 1027, torch.float32, "fp4", 128))


@pytest.mark.parametrize("quant_type", ["int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("T", [2, 8])
def test_books_of_integers_are_not_rounded(T, quant_type):
    """So the only rounding of what activations are rounded to is that of float32 sums."""
    call = four_bit_call(T, 40, 192, torch.float32, quant_type, FOUR_BIT_BOOKS[quant_type].blocksizes[0])
    out = gemm.gemm_4bit(**call)
    codes, absmax, _ = reference_quantize.quantize_int8_rowwise(call["x_TK"], 0.0)
    x = codes.double() * (absmax.double() / 127)[:, None]
    weight = reference.decode_weight(call, torch.float64)
    exact = x @ weight.T + (0 if call["bias"] is None else call["bias"].double())
    native = call | {"x_TK": x, "activations": "native"}
    native["x_TK"] = x.float()
    assert compare(out, exact, bounds.gemm_4bit(native, exact)) is None


@pytest.mark.parametrize("T", [3, 9])
def test_non_finite_values_stay_where_they_belong(T):
    call = four_bit_call(T, 67, 128, torch.float32, "nf4", 64)
    call["bias"] = None
    clean = gemm.gemm_4bit(**call)
    call["x_TK"][1, 3], call["x_TK"][2, 127] = math.nan, math.inf
    call["absmax"][2 * 5] = math.nan
    out = gemm.gemm_4bit(**call)
    assert not out[1:3].isfinite().any()
    assert out[:, 5].isnan().all()
    tokens, rows = [0, *range(3, T)], [*range(5), *range(6, 67)]
    assert torch.equal(out[tokens][:, rows], clean[tokens][:, rows])


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_token_gets_the_same_bits_among_few_and_among_many(dtype):
    four_bit = four_bit_call(140, 33, 4224, dtype, "nf4", 64)
    weight = int8_weight_call(140, 33, 4224, dtype, biased=True)
    for op, call in ((gemm.gemm_4bit, four_bit), (int8.gemm_int8_weight, weight)):
        for whole, parts in (((0, 4), ((0, 1), (1, 3), (1, 4))), ((0, 140), ((0, 5), (1, 70), (133, 140)))):
            expected = op(**call | {"x_TK": call["x_TK"][slice(*whole)]})
            for i, j in parts:
                assert torch.equal(op(**call | {"x_TK": call["x_TK"][i:j]}), expected[i:j])


def test_other_dtypes_are_declined_in_words():
    assert "dtype is torch.float64" in int8.int8_gemm.q_accepts(dtype=torch.float64)
    assert "x_TK is torch.float64" in int8.gemm_int8_weight.q_accepts(x_TK=torch.empty(1, 1, dtype=torch.float64))
