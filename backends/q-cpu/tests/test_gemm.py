"""The matrix products against float64, within the bound of their float32 sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_cpu import gemm, quantize

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS32 = torch.finfo(torch.float32).eps


def assert_within_rounding(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """``out`` is ``x @ w.T + bias`` but for K + 2 float32 roundings of what was summed, and one to its dtype."""
    x64, w64 = x.double(), w.double()
    b64 = torch.zeros(w.shape[0], dtype=torch.float64) if bias is None else bias.double()
    exact = x64 @ w64.T + b64
    summed = x64.abs() @ w64.abs().T + b64.abs()
    finfo = torch.finfo(out.dtype)
    bound = (x.shape[-1] + 2) * EPS32 / 2 * summed
    bound = bound + finfo.eps / 2 * (exact.abs() + bound) + finfo.smallest_normal * finfo.eps
    assert ((out.double() - exact).abs() <= bound).all()


def weight(N: int, K: int, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes and absmax of a random weight, and the weight that they decode to."""
    packed, absmax = quantize.quantize_4bit(
        torch.randn(N, K, generator=torch.Generator().manual_seed(N * 1000 + K)), blocksize, quant_type
    )
    return packed, absmax, quantize.dequantize_4bit(packed, absmax, blocksize, quant_type, (N, K), torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 64, 67, 130])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 33), (8, 512), (37, 1029), (65, 250)])
def test_gemm_4bit(T, N, K, dtype):
    packed, absmax, w = weight(N, K, 64, "nf4")
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(T)).to(dtype)
    bias = torch.randn(N).to(dtype)
    for b in (None, bias):
        out = gemm.gemm_4bit(x, packed, absmax, 64, "nf4", (N, K), b, "native")
        assert out.shape == (T, N)
        assert out.dtype == dtype
        assert_within_rounding(out, x, w, b)


@given(
    leading=st.lists(st.integers(0, 5), max_size=3),
    N=st.integers(0, 40),
    K=st.integers(0, 300),
    blocksize=st.sampled_from((32, 64, 128, 4096)),
    quant_type=st.sampled_from(("nf4", "fp4")),
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
    assert_within_rounding(out.view(T, N), x.reshape(T, K), w, None)


def test_a_token_gets_the_same_bits_in_any_batch():
    N, K = 70, 1300
    packed, absmax, _ = weight(N, K, 64, "nf4")
    x = torch.randn(150, K)
    whole = gemm.gemm_4bit(x, packed, absmax, 64, "nf4", (N, K), None, "native")
    for first, last in ((0, 1), (0, 2), (5, 8), (60, 68), (149, 150), (3, 150)):
        part = gemm.gemm_4bit(x[first:last], packed, absmax, 64, "nf4", (N, K), None, "native")
        assert torch.equal(part, whole[first:last])


def test_nan_and_infinity_stay_in_their_token():
    packed, absmax, w = weight(16, 96, 64, "nf4")
    x = torch.randn(6, 96)
    x[2, 95] = math.nan
    x[4, 3] = math.inf
    out = gemm.gemm_4bit(x, packed, absmax, 64, "nf4", (16, 96), None, "native")
    assert out[2].isnan().all()
    assert not out[4].isfinite().any()
    assert_within_rounding(out[[0, 1, 3, 5]], x[[0, 1, 3, 5]], w, None)


def test_a_poisoned_block_reaches_its_outputs_only():
    w = torch.randn(16, 64)
    w[5, 9] = math.inf
    packed, absmax = quantize.quantize_4bit(w, 64, "nf4")
    out = gemm.gemm_4bit(torch.randn(5, 64), packed, absmax, 64, "nf4", (16, 64), None, "native")
    assert out[:, 5].isnan().all()
    assert out[:, torch.arange(16) != 5].isfinite().all()


def test_other_dtypes_are_declined_in_words():
    wide = torch.empty(1, 1, dtype=torch.float64)
    assert "x_TK is torch.float64" in gemm.gemm_4bit.q_accepts(x_TK=wide, quant_type="nf4", activations="native")
    declined = gemm.gemm_4bit.q_accepts(x_TK=torch.empty(1, 1), quant_type="int4", activations="native")
    assert declined == "quant_type 'int4', only nf4, fp4"
