"""Experts one at a time in float64, through every tile; the router beside torch's own sort and softmax."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from q_core import ops
from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.specs import record_of
from q_triton import moe, tiles
from q_triton.environment import interpreted_target
from q_triton.kernels.sort_tokens import sort_pairs_kernel
from q_triton.launch import launch
from q_triton.targets import target_named
from q_triton.tiles import Tile, Tiles, tile

TARGET = target_named(interpreted_target() or "")
importlib.import_module(f"q_{TARGET.platform}.tiles")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("dense", "int8", "fp8", *FOUR_BIT_BOOKS)
Use = Callable[[Tiles, Tile], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a kernel have one tile, whatever the call."""

    def set_tile(kernel: Tiles, choice: Tile) -> None:
        only = Tile(choice.blocks, choice.warps, choice.stages)
        monkeypatch.setattr(tiles, "_tuned", {TARGET.name: {kernel.kernel: (only,)}})
        tiles._source.cache_clear()

    yield set_tile
    monkeypatch.undo()
    tiles._source.cache_clear()


def experts(format: str, E: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights of E experts as the format holds them, their scales, and what they decode to."""
    w = torch.randn(E, rows, columns) / columns**0.5
    if format == "dense":
        return w.to(dtype), None, w.to(dtype).double()
    if format in ("int8", "fp8"):
        peak = {"int8": 127, "fp8": 448}[format]
        absmax = w.abs().amax(-1)
        codes = w * (peak / absmax)[..., None]
        codes = codes.round().to(torch.int8) if format == "int8" else codes.to(torch.float8_e4m3fn)
        return codes, absmax, codes.double() * (absmax.double() / peak)[..., None]
    blocksize = FOUR_BIT_BOOKS[format].blocksizes[0]
    packed, absmax = zip(*(ops.quantize_4bit(e, blocksize=blocksize, quant_type=format) for e in w), strict=True)
    decoded = [
        ops.dequantize_4bit(p, a, shape=(rows, columns), blocksize=blocksize, quant_type=format, dtype=torch.float32)
        for p, a in zip(packed, absmax, strict=True)
    ]
    return torch.stack(packed), torch.stack(absmax), torch.stack(decoded).double()


def oracle(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Pair by pair, in float64; an id that no expert has gives nothing."""
    total = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            if 0 <= e < w13.shape[0]:
                gate, up = (w13[e] @ x[t].double()).chunk(2)
                total[t] += weight * (w2[e] @ (F.silu(gate) * up))
    return total


def check(format: str, dtype: torch.dtype, T: int, K: int, N: int, E: int, ids: Tensor) -> None:
    """A call with these ids, beside the oracle."""
    w13, w13_scale, dense13 = experts(format, E, 2 * N, K, dtype)
    w2, w2_scale, dense2 = experts(format, E, K, N, dtype)
    x, weights = torch.randn(T, K).to(dtype), torch.rand(ids.shape)
    blocksize = FOUR_BIT_BOOKS[format].blocksizes[0] if format in FOUR_BIT_BOOKS else 64
    arguments = (x, w13, w2, weights, ids.int(), format, N, w13_scale, w2_scale, blocksize)
    out = moe.fused_moe(*arguments)
    assert out.dtype is dtype and out.shape == (T, K)
    expected = oracle(x, dense13, dense2, weights, ids)
    record = record_of("fused_moe")
    bound = record.bound(dict(zip(record.arguments, arguments, strict=True)), expected)
    assert bool(((out.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize(("T", "K", "N"), [(3, 64, 32), (33, 33, 17)])
@pytest.mark.parametrize("format", FORMATS)
def test_fused_moe(format: str, T: int, K: int, N: int) -> None:
    check(format, torch.bfloat16, T, K, N, 3, torch.randint(0, 3, (T, 2)))


def _every_tile(*kernels: Tiles) -> list[Any]:
    return [
        pytest.param(kernel, choice, id=f"{kernel.kernel}-{'-'.join(map(str, choice.blocks.values()))}-w{choice.warps}")
        for kernel in kernels
        for choice in kernel.known()
    ]


@pytest.mark.parametrize(("kernel", "choice"), _every_tile(moe.DENSE, moe.CODES, moe.FOUR_BIT, moe.FLOAT32, moe.UNALIGNED))
def test_every_tile(kernel: Tiles, choice: Tile, use: Use) -> None:
    """Among the experts are one with more pairs than a tile, one with few and one with none; rows don't end where a block does."""
    use(kernel, choice)
    format = {"moe_gemm_codes": "int8", "moe_gemm_4bit": "nf4"}.get(kernel.kernel, "dense")
    dtype = torch.float32 if kernel is moe.FLOAT32 else torch.float16
    T = choice.blocks["BLOCK_T"] + 20
    K, N, E = (50, 22, 4) if kernel is moe.UNALIGNED else (160, 96, 4)
    ids = torch.zeros(T, 2, dtype=torch.int64)
    ids[:9, 1] = 3
    ids[9:20, 1] = 1
    check(format, dtype, T, K, N, E, ids)


@pytest.mark.parametrize(("kernel", "choice"), _every_tile(moe.ROUTE_TOPK))
def test_every_tile_of_the_router(kernel: Tiles, choice: Tile, use: Use) -> None:
    use(kernel, choice)
    check_route(torch.randn(11, 40), 5, "softmax")


@pytest.mark.parametrize(("kernel", "choice"), _every_tile(moe.SUM_PAIRS))
@pytest.mark.parametrize("k", [1, 3, 11])
def test_every_tile_of_the_sum(k: int, kernel: Tiles, choice: Tile, use: Use) -> None:
    use(kernel, choice)
    check("dense", torch.float32, 1, 600, 8, 3, torch.randint(0, 3, (1, k)))


@pytest.mark.parametrize(("kernel", "choice"), _every_tile(moe.SORT_PAIRS))
@pytest.mark.parametrize("P", [65, 300, 4100])
def test_pairs_are_sorted_as_a_stable_sort_has_them(P: int, kernel: Tiles, choice: Tile) -> None:
    E = 5
    ids = torch.randint(-1, E + 2, (P,), dtype=torch.int32)
    order, starts = torch.full((P,), -7, dtype=torch.int32), torch.full((E + 1,), -7, dtype=torch.int32)
    launch(sort_pairs_kernel, (E,), choice, ids=ids, order=order, starts=starts, P=P, E=E)
    kept = ((ids >= 0) & (ids < E)).nonzero().flatten()
    expected = kept[ids[kept].sort(stable=True).indices]
    assert torch.equal(order[: len(kept)].long(), expected) and bool((order[len(kept) :] == -7).all())
    assert starts.tolist() == [int(((ids >= 0) & (ids < e)).sum()) for e in range(E + 1)]


def test_the_second_product_in_parts(use: Use) -> None:
    use(moe.DENSE, tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=32, GROUP_T=8, PROGRAMS=64))
    check("dense", torch.bfloat16, 1, 32, 544, 4, torch.tensor([[1, 3]]))


@pytest.mark.parametrize("T", [20, 40])
def test_ids_that_repeat_or_that_no_expert_has(T: int) -> None:
    ids = torch.randint(-2, 5, (T, 3))
    ids[3] = 1
    ids[4] = -1
    ids[5] = 2**31 - 1
    check("dense", torch.float32, T, 32, 16, 3, ids)


def test_the_same_call_gives_the_same_bits() -> None:
    w13, w2, x, weights = torch.randn(3, 32, 32), torch.randn(3, 32, 16), torch.randn(40, 32), torch.rand(40, 2)
    ids = torch.randint(0, 3, (40, 2), dtype=torch.int32)
    first, second = (moe.fused_moe(x, w13, w2, weights, ids, "dense", 16, None, None, 64) for _ in range(2))
    assert torch.equal(first, second)


def test_no_pair_at_all() -> None:
    w13, w2 = torch.ones(3, 8, 16), torch.ones(3, 16, 4)
    x = torch.randn(40, 16)
    for ids in (torch.full((40, 3), -1), torch.empty(40, 0)):
        out = moe.fused_moe(x, w13, w2, torch.ones(ids.shape), ids.int(), "dense", 4, None, None, 64)
        assert torch.equal(out, torch.zeros_like(x))


@pytest.mark.parametrize("T", [6, 40])
def test_only_what_is_chosen_counts(T: int) -> None:
    """An expert that nobody chose may hold NaN; a token's NaN stays its own."""
    w13, _, _ = experts("dense", 3, 16, 16, torch.float32)
    w2, _, _ = experts("dense", 3, 16, 8, torch.float32)
    w13[1], w2[1] = torch.nan, torch.nan
    ids = torch.randint(0, 2, (T, 2), dtype=torch.int32) * 2
    x = torch.randn(T, 16)
    x[2, 3] = torch.nan
    x[4, 5] = torch.inf
    out = moe.fused_moe(x, w13, w2, torch.ones(T, 2), ids, "dense", 8, None, None, 64)
    spoilt = ~out.isfinite().all(1)
    assert spoilt[2] and spoilt[4] and spoilt.sum() == 2


def test_more_tokens_than_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "MOST_PAIRS", 40)
    check("int8", torch.float16, 50, 32, 16, 3, torch.randint(-1, 3, (50, 2)))


def check_route(logits: Tensor, k: int, scoring: str) -> None:
    """Beside torch's stable sort and float64 scores."""
    T = logits.shape[0]
    wide = logits.double()
    expected_ids = wide.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    chosen = (wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()).gather(1, expected_ids)
    record = record_of("route_topk")
    for renormalize in (False, True):
        weights, ids = moe.route_topk(logits, k, renormalize, scoring)
        expected = chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen
        expected = torch.where(wide.isnan().any(-1, keepdim=True), torch.nan, expected)
        assert ids.dtype is torch.int32 and ids.shape == (T, k) and torch.equal(ids.long(), expected_ids)
        bound, _ = record.bound({}, (expected, ids))
        assert bool(((weights.double() - expected).abs() <= bound)[~expected.isnan()].all())
        assert torch.equal(weights.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E", [1, 7, 64, 257, 3000])
def test_route_topk(E: int, scoring: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(9, E) * 3).to(dtype)
    logits[:4] = logits[:4].round()  # equal ones
    check_route(logits, min(E, 6), scoring)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_logits_of_every_kind_are_in_torchs_order(scoring: str) -> None:
    kinds = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, -torch.nan])
    logits = torch.stack([kinds[torch.randint(0, n, (20,))] for n in (2, 4, 6, 8, 10, 12, 12)])
    check_route(logits, 20, scoring)


def test_weights_hold_their_bound_far_below_the_largest() -> None:
    check_route(torch.linspace(-80, 5, 200).view(2, 100), 100, "softmax")
    check_route(torch.linspace(-80, 20, 200).view(2, 100), 100, "sigmoid")


def test_a_strided_router() -> None:
    check_route(torch.randn(6, 30)[:, ::2], 3, "softmax")
    check_route(torch.randn(12, 30)[::2, 5:18], 3, "softmax")


def test_more_experts_than_fit_are_declined() -> None:
    logits = torch.empty(1, moe.MOST_EXPERTS + 1)
    assert moe.route_topk.q_accepts(logits) == "8193 experts, at most 8192"
