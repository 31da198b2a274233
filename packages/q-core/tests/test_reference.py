"""The reference against formulations that share no line with it: numpy in float64, torch's own functions, brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core import bound, ops, use_backends
from q_core.formats.codebooks import (
    DYNAMIC_SIGNED_BOUND,
    DYNAMIC_UNSIGNED_BOUND,
    FOUR_BIT_BOOKS,
    INT8_BOUND,
    FourBitType,
    dynamic_map,
)
from q_core.specs import RECORDS
from q_core.testing import disagreements

pytestmark = pytest.mark.usefixtures("reference_only")


@pytest.fixture(scope="module")
def reference_only():  # type: ignore[no-untyped-def]
    with use_backends("reference"):
        yield


def brute_force_codes(A: Tensor, book: np.ndarray, blocksize: int) -> np.ndarray:
    """Nearest by scanning the whole book, in float32 scaling and float32 midpoints, as the contract has it."""
    flat = A.float().reshape(-1).numpy()
    codes = np.empty(flat.size, np.int64)
    order = np.argsort(book, kind="stable")
    ascending = book[order].astype(np.float32)
    midpoints = (ascending[1:] + ascending[:-1]) / np.float32(2)
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        absmax = np.abs(block).max()
        scaled = np.zeros_like(block) if absmax == 0 else (
            block / absmax if absmax < np.finfo(np.float32).tiny else block * (np.float32(1) / absmax)
        )  # fmt: skip
        scaled = np.clip(scaled, -1, 1)
        codes[start : start + blocksize] = order[(scaled[:, None] > midpoints[None]).sum(1)]
    return codes


SPECIAL = torch.tensor([0.0, -0.0, 1e-40, -1e-45, 1e-38, 3e38, -3e38, 1.0, -1.0, 0.5])


@pytest.mark.parametrize("signed", [True, False])
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 700), st.sampled_from([32, 256]), st.sampled_from([1e-42, 1e-3, 1.0, 1e30]), st.integers(0, 999))
def test_blockwise_codes(signed: bool, numel: int, blocksize: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(numel, generator=generator) * scale
    A[torch.rand(numel, generator=generator) < 0.1] = 0.0
    code = dynamic_map(signed=signed)
    codes, absmax = ops.quantize_blockwise(A, code, blocksize=blocksize)
    expected = brute_force_codes(A, code.numpy(), blocksize)
    np.testing.assert_array_equal(codes.numpy(), expected)
    assert absmax.numel() == math.ceil(numel / blocksize)


@pytest.mark.parametrize("quant_type", [name for name, book in FOUR_BIT_BOOKS.items() if book.scale == "absmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4bit_codes_packing_and_bound(quant_type: FourBitType, dtype: torch.dtype) -> None:
    book = FOUR_BIT_BOOKS[quant_type]
    values = np.array(book.values, np.float32)
    for numel in (0, 1, 2, 63, 64, 65, 4097):
        A = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
        packed, absmax = ops.quantize_4bit(A, blocksize=64, quant_type=quant_type)
        codes = [int(b) >> 4 if i % 2 == 0 else int(b) & 15 for b in packed for i in range(2)]
        if numel % 2:
            assert values[codes[-1]] == 0, "an odd count is padded with the code of 0"
        # FP4 has two zeros; a decoded value is what counts.
        ordered = np.array(book.ordered)
        expected = ordered[brute_force_codes(A, values[ordered], 64)] if numel else np.array([], int)
        np.testing.assert_array_equal(np.array(codes[:numel], int), expected)
        decoded = ops.dequantize_4bit(packed, absmax, shape=(numel,), quant_type=quant_type)
        error = (decoded - A.float()).abs() / absmax.repeat_interleave(64)[:numel]
        assert not numel or error.max() <= book.bound * (1 + 1e-5)


def test_expected_error_of_normal_weights() -> None:
    """FORMATS.md's figures: mean |error| on N(0, 1), block 64."""
    A = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for quant_type, expected in (("nf4", 0.0728), ("fp4", 0.0967)):
        packed, absmax = ops.quantize_4bit(A, quant_type=quant_type)
        decoded = ops.dequantize_4bit(packed, absmax, shape=A.shape, quant_type=quant_type)
        assert abs(float((decoded - A).abs().mean()) - expected) < 3e-4


@pytest.mark.parametrize(("signed", "limit"), [(True, DYNAMIC_SIGNED_BOUND), (False, DYNAMIC_UNSIGNED_BOUND)])
def test_blockwise_round_trip_within_the_formats_bound(signed: bool, limit: float) -> None:
    A = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    A = A if signed else A.abs()
    code = dynamic_map(signed=signed)
    codes, absmax = ops.quantize_blockwise(A, code)
    error = (ops.dequantize_blockwise(codes, absmax, code) - A).abs() / absmax.repeat_interleave(256)
    assert error.max() <= limit


@pytest.mark.parametrize("signed", [True, False])
def test_zero_encodes_to_zero(signed: bool) -> None:
    A = torch.zeros(1000)
    A[::7] = torch.rand(143)
    code = dynamic_map(signed=signed)
    codes, absmax = ops.quantize_blockwise(A, code)
    decoded = ops.dequantize_blockwise(codes, absmax, code)
    assert torch.equal(decoded == 0, A == 0)
    codes, absmax = ops.quantize_blockwise(torch.zeros(300), code)
    assert not absmax.any() and not ops.dequantize_blockwise(codes, absmax, code).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_poisons_its_block_and_no_other(bad: float) -> None:
    A = torch.randn(200)
    A[70] = bad
    codes, absmax = ops.quantize_blockwise(A, blocksize=64)
    assert torch.equal(ops.dequantize_blockwise(codes, absmax, blocksize=64).isnan(), (torch.arange(200) // 64) == 1)
    packed, absmax = ops.quantize_4bit(A)
    assert torch.equal(ops.dequantize_4bit(packed, absmax, shape=(200,)).isnan(), (torch.arange(200) // 64) == 1)
    q, scale, _ = ops.quantize_int8_rowwise(A.view(4, 50))
    assert torch.equal((q * scale[:, None]).isnan().all(1), torch.tensor([False, True, False, False]))


ALMOST_TIES = torch.arange(1.0, 301)[:, None] * torch.cat((torch.tensor([254.0]), torch.arange(-253.0, 254, 2)))
"""Rows whose values stand half-way between two codes, where the last bit of 127 / absmax decides."""


@pytest.mark.parametrize(
    "A",
    [ALMOST_TIES, torch.randn(50, 77, generator=torch.Generator().manual_seed(0)) * torch.logspace(-38, 38, 50)[:, None]],
    ids=["almost ties", "every magnitude"],
)
def test_int8_rows(A: Tensor) -> None:
    q, scale, outliers = ops.quantize_int8_rowwise(A)
    absmax = A.abs().numpy().max(1)
    np.testing.assert_array_equal(scale.numpy(), absmax)
    with np.errstate(over="ignore"):
        factor = np.float32(127) / absmax
    rows = np.where(np.isfinite(factor)[:, None], A.numpy() * factor[:, None], A.numpy() / absmax[:, None] * np.float32(127))
    np.testing.assert_array_equal(q.numpy(), np.clip(np.rint(rows), -127, 127).astype(np.int8))
    assert not outliers.any()
    error = (q.double() * scale.double()[:, None] / 127 - A.double()).abs() / scale.double()[:, None]
    assert error.max() <= INT8_BOUND * (1 + 1e-5)


def test_int8_outlier_columns() -> None:
    A = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    A[2, 5], A[4, 5], A[1, 30] = 60.0, 1.0, -6.0
    q, scale, outliers = ops.quantize_int8_rowwise(A, threshold=6.0)
    assert outliers.nonzero().flatten().tolist() == [5, 30]
    assert not q[:, [5, 30]].any()
    counted = A.clone()
    counted[2, 5] = counted[1, 30] = 0.0
    torch.testing.assert_close(scale, counted.abs().amax(1), rtol=0, atol=0)


def test_gemm_against_float64() -> None:
    x, w, bias = torch.randn(9, 33), torch.randn(7, 33), torch.randn(7)
    torch.testing.assert_close(ops.gemm(x, w, bias=bias), (x.double() @ w.double().T + bias).float())
    packed, absmax = ops.quantize_4bit(w)
    decoded = ops.dequantize_4bit(packed, absmax, shape=w.shape).double()
    torch.testing.assert_close(ops.gemm_4bit(x, packed, absmax, shape=w.shape, bias=bias), (x.double() @ decoded.T + bias).float())
    q, scale, _ = ops.quantize_int8_rowwise(w)
    expected = x.double() @ (q.double() * scale.double()[:, None] / 127).T
    torch.testing.assert_close(ops.gemm_int8_weight(x, q, scale), expected.float())


def test_int8_activations_are_rounded_rows() -> None:
    x, w = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), torch.randn(7, 64)
    packed, absmax = ops.quantize_4bit(w)
    decoded = ops.dequantize_4bit(packed, absmax, shape=w.shape).double()
    scale = x.abs().amax(1, keepdim=True).double()
    rounded = (x.double() * 127 / scale).round() * scale / 127
    got = ops.gemm_4bit(x, packed, absmax, shape=w.shape, activations="int8")
    torch.testing.assert_close(got, (rounded @ decoded.T).float())
    assert not torch.allclose(got, ops.gemm_4bit(x, packed, absmax, shape=w.shape))


def test_int8_gemm_is_exact_at_the_largest_sums() -> None:
    K = 131_071
    a = torch.tensor([[-127], [-128]], dtype=torch.int8).repeat(1, K)
    b = torch.tensor([[127], [-128]], dtype=torch.int8).repeat(1, K)
    y = ops.int8_gemm(a, b, torch.ones(2), torch.ones(2))
    products = torch.tensor([[-127.0 * 127, 127 * 128], [-128 * 127, 128 * 128]], dtype=torch.float64)
    torch.testing.assert_close(y, (K * products / 16129).float())


def test_int8_gemm_refuses_sums_past_int32() -> None:
    a = torch.zeros(1, 131_072, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"int8_gemm.*b_NK.*131071"):
        ops.int8_gemm(a, a, torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("H", [4, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_paged_attention_against_sdpa_request_by_request(H: int, causal: bool) -> None:
    G, D, S = 4, 16, 4
    generator = torch.Generator().manual_seed(0)
    query_lens, seq_lens = [5, 1, 0, 3], [5, 18, 7, 9]
    k_cache, v_cache = (torch.full((40, G, S, D), float("nan")) for _ in range(2))
    order = torch.randperm(40, generator=generator)
    tables = torch.full((4, 6), 1_000_000, dtype=torch.int32)
    keys, values, used = [], [], 0
    for r, length in enumerate(seq_lens):
        blocks = order[used : used + math.ceil(length / S)]
        used += len(blocks)
        tables[r, : len(blocks)] = blocks
        position = torch.arange(length)
        k, v = (torch.randn(length, G, D, generator=generator) for _ in range(2))
        ops.write_kv(k, v, k_cache, v_cache, blocks[position // S] * S + position % S)
        keys.append(k)
        values.append(v)
    q = torch.randn(sum(query_lens), H, D, generator=generator)
    start = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    out = ops.paged_attention(
        q, k_cache, v_cache, tables, start, torch.tensor(seq_lens, dtype=torch.int32),
        max_query_len=max(query_lens), max_seq_len=max(seq_lens), causal=causal,
    )  # fmt: skip
    assert not out.isnan().any(), "unused slots of a block must not leak"
    for r, (a, b) in enumerate(zip(start[:-1].tolist(), start[1:].tolist(), strict=True)):
        visible = torch.ones(b - a, seq_lens[r], dtype=torch.bool)
        if causal:
            visible = visible.tril(seq_lens[r] - (b - a))
        expected = F.scaled_dot_product_attention(
            q[a:b].transpose(0, 1).double(), keys[r].transpose(0, 1).double(), values[r].transpose(0, 1).double(),
            attn_mask=visible, enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(out[a:b], expected.transpose(0, 1).float())


def test_write_kv_skips_negative_slots() -> None:
    k_cache, v_cache = torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 3)
    k = torch.arange(1, 5.0)[:, None, None].expand(4, 1, 3)
    ops.write_kv(k, -k, k_cache, v_cache, torch.tensor([-1, 6, -1, 0]))
    assert k_cache[:, 0, :, 0].tolist() == [[4, 0, 0, 0], [0, 0, 2, 0]]
    assert torch.equal(v_cache, -k_cache)
    ops.write_kv(k, k, k_cache, v_cache, torch.full((4,), -1))
    assert k_cache[:, 0, :, 0].tolist() == [[4, 0, 0, 0], [0, 0, 2, 0]]


def test_norms_against_torch() -> None:
    x, residual, weight = torch.randn(5, 33), torch.randn(5, 33), torch.randn(33)
    torch.testing.assert_close(ops.rms_norm(x, weight, eps=1e-5), F.rms_norm(x, (33,), weight, 1e-5))
    normed, total = ops.add_rms_norm(x, residual, weight, eps=1e-5)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (33,), weight, 1e-5))
    gate, up = torch.randn(4, 9), torch.randn(4, 9)
    torch.testing.assert_close(ops.silu_and_mul(torch.cat((gate, up), -1)), F.silu(gate) * up)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding_is_a_complex_rotation(interleaved: bool) -> None:
    q, k, positions = torch.randn(6, 3, 10), torch.randn(6, 1, 10), torch.tensor([3, 0, 9, 9, 1, 2])
    angle = torch.outer(torch.arange(10.0), torch.tensor([1.0, 0.3, 0.01]))
    turned = ops.rotary_embedding(q, k, positions, angle.cos(), angle.sin(), interleaved=interleaved)
    for x, y in zip((q, k), turned, strict=True):
        first, second = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
        z = torch.complex(first, second) * torch.polar(torch.ones(6, 3), angle[positions])[:, None]
        got = torch.complex(*((y[..., 0:6:2], y[..., 1:6:2]) if interleaved else (y[..., :3], y[..., 3:6])))
        torch.testing.assert_close(got, z)
        assert torch.equal(y[..., 6:], x[..., 6:])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_32bit_against_torch(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, generator=generator)
    peer = torch.nn.Parameter(p.double())
    optimizer = torch.optim.AdamW([peer], lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=weight_decay)
    m, v = torch.zeros(50), torch.zeros(50)
    for step in range(1, 31):
        g = torch.randn(50, generator=generator)
        ops.optimizer_step_32bit(
            "adamw", [p], [g], [m], [v], lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=weight_decay, step=step
        )
        peer.grad = g.double()
        optimizer.step()
    torch.testing.assert_close(p.double(), peer.detach(), rtol=1e-5, atol=1e-6)


def blocks_step(p: Tensor, g: Tensor, states: list[Tensor], step: int, **changes: float) -> None:
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0} | changes
    codes1, codes2, absmax1, absmax2 = states
    ops.optimizer_step_8bit(
        "adamw", [p], [g], [codes1], [codes2], absmax1=[absmax1], absmax2=[absmax2], step=step, **settings,
    )  # fmt: skip


def fresh_states(numel: int) -> list[Tensor]:
    zero = [ops.quantize_blockwise(torch.zeros(numel), dynamic_map(signed=s)) for s in (True, False)]
    return [zero[0][0], zero[1][0], zero[0][1], zero[1][1]]


def test_adamw_8bit_follows_the_exact_rule_between_encodings() -> None:
    """Decode, update in float64, encode: written out in numpy, and equal but for a rounding that crosses a midpoint."""
    generator = torch.Generator().manual_seed(0)
    p, states = torch.randn(700, generator=generator), fresh_states(700)
    maps = [dynamic_map(signed=s).double().numpy() for s in (True, False)]
    for step in range(1, 6):
        g = torch.randn(700, generator=generator)
        m, v = (maps[i][states[i].numpy()] * np.repeat(states[2 + i].double().numpy(), 256)[:700] for i in range(2))
        m, v = 0.9 * m + 0.1 * g.double().numpy(), 0.99 * v + 0.01 * g.double().numpy() ** 2
        expected = p.double().numpy() - 1e-2 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
        blocks_step(p, g, states, step)
        np.testing.assert_allclose(p.numpy(), expected, rtol=1e-4, atol=1e-6)
        for i, value in enumerate((m, v)):
            ideal, _ = ops.quantize_blockwise(torch.from_numpy(value).float(), dynamic_map(signed=i == 0))
            assert (ideal.int() - states[i].int()).abs().max() <= 1


def test_a_parameter_without_gradient_never_moves() -> None:
    p, states = torch.randn(600), fresh_states(600)
    before = p.clone()
    g = torch.zeros(600)
    g[:100] = torch.randn(100)
    for step in range(1, 20):
        blocks_step(p, g, states, step)
    assert torch.equal(p[100:], before[100:]) and not torch.equal(p[:100], before[:100])
    blocks_step(p, g, states, 20, eps=0.0)
    assert torch.equal(p[100:], before[100:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_with_a_non_finite_gradient_stays_as_it_is(bad: float) -> None:
    p, states = torch.randn(600), fresh_states(600)
    blocks_step(p, torch.randn(600), states, 1)
    before = [t.clone() for t in (p, *states)]
    g = torch.randn(600)
    g[300] = bad
    blocks_step(p, g, states, 2)
    inside = (torch.arange(600) // 256) == 1
    for old, new in zip(before[:3], (p, *states[:2]), strict=True):
        assert torch.equal(old[inside], new[inside]) and not torch.equal(old[~inside], new[~inside])
    assert [bool(a == b) for a, b in zip(before[3], states[2], strict=True)] == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", RECORDS)
def test_every_dtype_is_within_the_records_bound_of_float64(op: str, dtype: torch.dtype) -> None:
    assert [str(d) for seed in range(2) for d in disagreements(op, bound(op), dtype, seed=seed)] == []
