"""Norms, rotary embedding and gated activation against float64, at every tail length."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from q_cpu import norm

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = [*range(1, 132), 255, 256, 257, 1000, 4099]


def assert_rounded_once(got: Tensor, exact: Tensor, ulps: float = 4.0) -> None:
    """Within half a unit of the dtype, and a few of float32, of the exact value."""
    assert got.is_contiguous()
    relative = torch.finfo(got.dtype).eps / 2 + ulps * torch.finfo(torch.float32).eps
    tiny = torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - exact).abs() <= exact.abs() * relative + tiny).all())


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm(dtype):
    for K in WIDTHS:
        x, weight = (torch.randn(3, K) * 3).to(dtype), torch.randn(K).to(dtype)
        assert_rounded_once(norm.rms_norm(x, weight, 1e-5), normed(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", FLOATS)
def test_add_rms_norm(dtype):
    for K in WIDTHS:
        x, residual, weight = torch.randn(3, K).to(dtype), torch.randn(3, K).to(dtype), torch.randn(K).to(dtype)
        out, total = norm.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, (x.float() + residual.float()).to(dtype))
        assert_rounded_once(out, normed(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_and_mul(dtype):
    for N in WIDTHS:
        x = (torch.randn(3, 2 * N) * 4).to(dtype)
        gate, up = x.double().chunk(2, -1)
        assert_rounded_once(norm.silu_and_mul(x), gate * gate.sigmoid() * up, ulps=6.0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rotary_embedding(dtype, interleaved):
    for D, F in ((1, 0), (2, 1), (7, 3), (64, 32), (80, 16), (130, 65), (600, 299)):
        heads = [torch.randn(5, count, D).to(dtype) for count in (3, 1)]
        angles, positions = torch.randn(9, F) * 3, torch.tensor([8, 0, 3, 3, 1])
        cos, sin = angles.cos(), angles.sin()
        turn = torch.complex(cos.double(), sin.double())[positions].unsqueeze(1)
        for got, x in zip(norm.rotary_embedding(*heads, positions, cos, sin, interleaved), heads, strict=True):
            rotated = x[..., : 2 * F].double()
            pairs = rotated.unflatten(-1, (F, 2)) if interleaved else rotated.unflatten(-1, (2, F)).transpose(-1, -2)
            turned = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * turn)
            exact = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
            assert torch.equal(got[..., 2 * F :], x[..., 2 * F :])
            relative = torch.finfo(dtype).eps / 2
            magnitude = rotated.abs().amax() * 2 if F else 0.0
            error = (got[..., : 2 * F].double() - exact).abs()
            assert bool((error <= exact.abs() * relative + magnitude * torch.finfo(torch.float32).eps).all())


def test_silu_tells_the_exponential_to_the_units_that_it_claims():
    """silu(x) / x is e^x / (1 + e^x); far below zero that is e^x, whose claim is 2.5 units, and three roundings follow."""
    x = torch.linspace(-80, 80, 400_001)
    got = norm.silu_and_mul(torch.cat((x, torch.ones_like(x))))
    exact = x.double() * x.double().sigmoid()
    unit = torch.finfo(torch.float32).eps / 2
    assert float(((got.double() - exact).abs() / exact.abs().clamp_min(1e-35)).max()) <= 8 * unit


def test_silu_of_extreme_values():
    x = torch.tensor([-math.inf, -1e30, -100.0, -88.5, -0.0, 0.0, 88.5, 1e30, math.inf, math.nan])
    got = norm.silu_and_mul(torch.cat((x, torch.ones_like(x))))
    assert not bool(got[0].isfinite()) and bool(got[-1].isnan())
    assert bool((got[1:6].abs() < 1e-35).all())
    assert got[6:9].tolist() == x[6:9].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_below_the_smallest_normal_number_are_rounded_and_not_flushed(dtype):
    unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for N in (1, 32, 33, 70):
        gate, up = torch.rand(3, N).to(dtype) + 0.5, (torch.randint(0, 64, (3, N)) * unit).to(dtype)
        got = norm.silu_and_mul(torch.cat((gate, up), -1)).double()
        exact = gate.double() * gate.double().sigmoid() * up.double()
        assert float(exact.max()) < torch.finfo(dtype).smallest_normal
        assert float(((got - exact).abs() / unit).max()) <= 0.5001


@pytest.mark.parametrize("K", [8192, 8200])  # rows of whole cache lines, and others
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_output_too_large_for_the_caches_has_the_same_bits(dtype, K):
    """Such an output is written past the caches, where its rows allow it."""
    T = 2**24 // (K * dtype.itemsize) + 2
    x, residual, weight = torch.randn(T, 2 * K).to(dtype), torch.randn(T, K).to(dtype), torch.randn(K).to(dtype)
    narrow = x[:, :K]
    for op in (
        lambda rows: norm.silu_and_mul(x[rows]),
        lambda rows: norm.rms_norm(narrow[rows], weight, 1e-5),
        lambda rows: torch.stack(norm.add_rms_norm(narrow[rows], residual[rows], weight, 1e-5), 1),
    ):
        whole, half = op(slice(None)), T // 2
        assert torch.equal(whole[:half], op(slice(half))) and torch.equal(whole[half:], op(slice(half, None)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_slices_of_a_fused_projection_are_read_where_they_lie(dtype, monkeypatch: pytest.MonkeyPatch):
    fused = torch.randn(7, 96).to(dtype)
    q, k = fused[:, :64].unflatten(1, (4, 16)), fused[:, 64:].unflatten(1, (2, 16))
    angles, positions, weight = torch.randn(7, 8), torch.arange(7), torch.randn(32).to(dtype)
    expected = [
        *norm.rotary_embedding(q.contiguous(), k.contiguous(), positions, angles.cos(), angles.sin(), False),
        norm.rms_norm(fused[:, 64:].contiguous(), weight, 1e-6),
        norm.silu_and_mul(fused[:, :64].contiguous()),
    ]

    def refuse(tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous(), "copied"
        return tensor

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    got = [
        *norm.rotary_embedding(q, k, positions, angles.cos(), angles.sin(), False),
        norm.rms_norm(fused[:, 64:], weight, 1e-6),
        norm.silu_and_mul(fused[:, :64]),
    ]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
