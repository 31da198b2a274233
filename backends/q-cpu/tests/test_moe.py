"""Experts one at a time in float64, and the router by torch's own softmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from q_core import ops
from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.specs import record_of
from q_cpu import moe

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def experts(format: str, E: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights of E experts as the format holds them, their scales, and what they decode to."""
    w = torch.randn(E, rows, columns) / columns**0.5
    if format == "dense":
        return w.to(dtype), None, w.to(dtype)
    if format == "int8":
        codes, absmax, _ = ops.quantize_int8_rowwise(w)
        return codes, absmax, codes.double() * (absmax.double() / 127)[..., None]
    if format == "fp8":
        absmax = w.abs().amax(-1)
        codes = (w * (448 / absmax)[..., None]).to(torch.float8_e4m3fn)
        return codes, absmax, codes.double() * (absmax.double() / 448)[..., None]
    blocksize = FOUR_BIT_BOOKS[format].blocksizes[0]
    packed, absmax = zip(*(ops.quantize_4bit(e, blocksize=blocksize, quant_type=format) for e in w), strict=True)
    decoded = [
        ops.dequantize_4bit(p, a, shape=(rows, columns), blocksize=blocksize, quant_type=format, dtype=torch.float32)
        for p, a in zip(packed, absmax, strict=True)
    ]
    return torch.stack(packed), torch.stack(absmax), torch.stack(decoded)


def oracle(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    total = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            if e >= 0:
                gate, up = (x[t].double() @ w13[e].double().T).chunk(2)
                total[t] += weight * ((F.silu(gate) * up) @ w2[e].double().T)
    return total


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["dense", "int8", "fp8", *FOUR_BIT_BOOKS])
@pytest.mark.parametrize(("T", "K", "N", "E", "k"), [(1, 64, 32, 4, 2), (5, 40, 24, 3, 1), (37, 128, 72, 6, 3), (9, 33, 17, 2, 2)])
def test_fused_moe(format, T, K, N, E, k, dtype):
    w13, w13_scale, dense13 = experts(format, E, 2 * N, K, dtype)
    w2, w2_scale, dense2 = experts(format, E, K, N, dtype)
    x = torch.randn(T, K).to(dtype)
    ids = torch.stack([torch.randperm(E)[:k] for _ in range(T)]).to(torch.int32)
    ids[0, -1] = -1  # an expert that lives elsewhere
    weights = torch.rand(T, k)
    blocksize = FOUR_BIT_BOOKS[format].blocksizes[0] if format in FOUR_BIT_BOOKS else 64
    arguments = (x, w13, w2, weights, ids, format, N, w13_scale, w2_scale, blocksize)
    out = moe.fused_moe(*arguments)
    assert out.dtype is dtype and out.shape == (T, K)
    expected = oracle(x, dense13, dense2, weights, ids)
    record = record_of("fused_moe")
    bound = record.bound(dict(zip(record.arguments, arguments, strict=True)), expected)
    assert bool(((out.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "popular", [1, 400]
)  # tokens that choose expert 0 for sure: the experts share evenly, or one has nearly all
def test_more_tokens_and_pairs_than_are_taken_at_once(popular, dtype):
    T, K, N, E, k = 450, 4096, 8, 3, 2
    w13, _, dense13 = experts("dense", E, 2 * N, K, dtype)
    w2, _, dense2 = experts("dense", E, K, N, dtype)
    x, weights = torch.randn(T, K).to(dtype), torch.rand(T, k)
    ids = torch.randint(0, E, (T, k), dtype=torch.int32)
    ids[:popular] = 0
    arguments = (x, w13, w2, weights, ids, "dense", N, None, None, 64)
    out = moe.fused_moe(*arguments)
    expected = oracle(x, dense13, dense2, weights, ids)
    record = record_of("fused_moe")
    bound = record.bound(dict(zip(record.arguments, arguments, strict=True)), expected)
    assert bool(((out.double() - expected).abs() <= bound).all())


def test_an_expert_that_nobody_chose_is_not_read():
    w13, _, _ = experts("dense", 3, 8, 16, torch.float32)
    w2, _, _ = experts("dense", 3, 16, 4, torch.float32)
    w13[1], w2[1] = torch.nan, torch.nan
    ids = torch.tensor([[0, 2], [2, -1]], dtype=torch.int32)
    assert moe.fused_moe(torch.randn(2, 16), w13, w2, torch.ones(2, 2), ids, "dense", 4, None, None, 64).isfinite().all()


def test_nan_stays_in_its_token():
    w13, _, _ = experts("dense", 3, 8, 16, torch.float32)
    w2, _, _ = experts("dense", 3, 16, 4, torch.float32)
    x = torch.randn(6, 16)
    x[2, 3] = torch.nan
    out = moe.fused_moe(x, w13, w2, torch.ones(6, 2), torch.zeros(6, 2, dtype=torch.int32), "dense", 4, None, None, 64)
    assert out[2].isnan().all() and out[[0, 1, 3, 4, 5]].isfinite().all()


def test_an_expert_that_there_is_not_is_an_error_that_names_it():
    w13, _, _ = experts("dense", 3, 8, 16, torch.float32)
    w2, _, _ = experts("dense", 3, 16, 4, torch.float32)
    with pytest.raises(ValueError, match=r"fused_moe: topk_ids\[1\] is 3, expected at most 2"):
        moe.fused_moe(
            torch.randn(1, 16), w13, w2, torch.ones(1, 2), torch.tensor([[0, 3]], dtype=torch.int32), "dense", 4, None, None, 64
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E", [1, 2, 7, 8, 16, 61, 64, 257])
def test_route_topk(E, scoring, dtype):
    logits = (torch.randn(50, E) * 3).to(dtype)
    logits[:5] = logits[:5].round()  # equal ones
    k = min(E, 6)
    scores = logits.double().softmax(-1) if scoring == "softmax" else logits.double().sigmoid()
    expected_ids = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    for renormalize in (False, True):
        weights, ids = moe.route_topk(logits, k, renormalize, scoring)
        assert torch.equal(ids.long(), expected_ids)
        expected = scores.gather(1, expected_ids)
        if renormalize:
            expected /= expected.sum(-1, keepdim=True)
        torch.testing.assert_close(weights.double(), expected, rtol=3e-6, atol=1e-30)


def test_a_router_that_gives_nan_is_seen_and_stays_in_bounds():
    logits = torch.randn(3, 9)
    logits[1, 4] = torch.nan
    weights, ids = moe.route_topk(logits, 3, True, "softmax")
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()
    assert bool(((ids >= 0) & (ids < 9)).all()) and all(len(set(row)) == 3 for row in ids.tolist())


def test_too_many_experts_are_declined_in_words():
    assert moe.route_topk.q_accepts(logits_TE=torch.empty(1, 1025)) == "1025 experts, at most 1024"
