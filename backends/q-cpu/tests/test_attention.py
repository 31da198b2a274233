"""The paged cache and attention over it: against float64 query by query, and bit for bit whatever else is in a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from q_core.reference import attention as reference
from q_core.specs import bounds
from q_cpu import attention

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CODES = (None, torch.int8, torch.float8_e4m3fn)
PLAIN: dict[str, Any] = {"causal": True, "window": None, "softcap": None, "sinks_H": None}


@dataclass
class Sequences:
    """Requests whose keys and values lie in a paged cache, and the queries of all their positions."""

    queries: list[Tensor]
    caches: tuple[Tensor, Tensor]
    scales: tuple[Tensor | None, Tensor | None]
    tables: Tensor
    lengths: tuple[int, ...]

    def attend(self, parts: Sequence[tuple[int, int, int]], **settings: Any) -> list[Tensor]:
        """One call for the parts (request, first query, queries behind the last): the outputs of each part."""
        counts = [last - first for _, first, last in parts]
        requests = [r for r, _, _ in parts]
        start = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        ends = torch.tensor([last for _, _, last in parts], dtype=torch.int32)
        q = torch.cat([self.queries[r][first:last] for r, first, last in parts])
        out = attention.paged_attention(
            q, *self.caches, self.tables[requests], start, ends, max(counts), int(ends.max()), q.shape[-1] ** -0.5,
            **(PLAIN | settings), k_scale_BGS=self.scales[0], v_scale_BGS=self.scales[1],
        )  # fmt: skip
        return list(out.split(counts))


def sequences(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    codes: torch.dtype | None = None,
    *,
    H: int = 4,
    G: int = 2,
    D: int = 16,
    S: int = 16,
) -> Sequences:
    """Random ones; slots that hold no token are NaN."""
    widths = [math.ceil(length / S) for length in lengths]
    B = sum(widths) + 1
    order = torch.randperm(B).to(torch.int32)
    tables = torch.full((len(lengths), max(widths)), 2**30, dtype=torch.int32)
    shape = (B, G, S, D)
    caches = tuple(torch.full(shape, math.nan).to(codes or dtype) for _ in range(2))
    scales = tuple(torch.full(shape[:3], math.nan) if codes else None for _ in range(2))
    queries, used = [], 0
    for r, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        tables[r, :width] = order[used : used + width]
        used += width
        position = torch.arange(length)
        slots = tables[r, position // S].long() * S + position % S
        k, v = (torch.randn(length, G, D).to(dtype) for _ in range(2))
        attention.write_kv(k, v, *caches, slots, *scales)
        queries.append(torch.randn(length, H, D).to(dtype))
    return Sequences(queries, caches, scales, tables, lengths)


def by_hand(
    case: Sequences,
    r: int,
    first: int,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The queries of a request from `first` on, over the cache as decoded, in float64."""
    blocks = case.tables[r, : math.ceil(case.lengths[r] / case.caches[0].shape[2])].long()
    k, v = (
        reference.decode(cache, scale)[blocks].transpose(1, 2).flatten(0, 1)[: case.lengths[r]].double()
        for cache, scale in zip(case.caches, case.scales, strict=True)
    )
    q = case.queries[r][first:].double()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    distance = torch.arange(first, len(k))[:, None] - torch.arange(len(k))
    hidden = (distance < 0) & causal
    if window is not None:
        hidden = hidden | (distance >= window)
    weights = scores.masked_fill(hidden, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks_H is not None:
        total = total + sinks_H.double().exp()[:, None, None]
    return torch.einsum("hqk,khd->qhd", weights / total, v)


def assert_right(case: Sequences, r: int, got: Tensor, first: int = 0, **settings: Any) -> None:
    """The outputs of queries from `first` on are within the surface's bound of the exact ones."""
    exact = by_hand(case, r, first, **settings)
    call = {"q_THD": case.queries[r], "scale": case.queries[r].shape[-1] ** -0.5}
    for name, cache, scale in zip("kv", case.caches, case.scales, strict=True):
        call |= {f"{name}_cache_BGSD": cache, f"{name}_scale_BGS": scale}
    error = (got.double() - exact).abs()
    bound = bounds.paged_attention(call, exact)
    assert bool((error <= bound).all()), f"off by {float(error.max()):.3g} of {float(bound.max()):.3g}"


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"causal": False},
        {"window": 1},
        {"window": 33},
        {"softcap": 2.0},
        {"sinks_H": torch.linspace(-2, 3, 4)},
        {"window": 20, "softcap": 5.0, "sinks_H": torch.linspace(-2, 3, 4)},
    ],
)
def test_prefill(dtype, codes, settings):
    case = sequences((70, 1, 37), dtype, codes)
    for r, got in enumerate(case.attend([(0, 0, 70), (1, 0, 1), (2, 0, 37)], **settings)):
        assert_right(case, r, got, **settings)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_head_dim_and_block_size(dtype):
    for D in [*range(1, 70), 80, 96, 127, 128, 200, 256]:
        case = sequences((40,), dtype, H=3, G=1, D=D, S=1 + D % 19)
        (whole,) = case.attend([(0, 0, 40)])
        assert_right(case, 0, whole)
        assert torch.equal(case.attend([(0, 38, 40)])[0], whole[38:])


@pytest.mark.parametrize(("H", "G"), [(1, 1), (5, 5), (7, 1), (16, 2), (100, 1)])
def test_every_group_size(H, G):
    for dtype in FLOATS:
        case = sequences((45,), dtype, H=H, G=G)
        (whole,) = case.attend([(0, 0, 45)])
        assert_right(case, 0, whole)
        assert torch.equal(case.attend([(0, 44, 45)])[0], whole[44:])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("settings", [{}, {"window": 1500}, {"sinks_H": torch.linspace(-2, 3, 3), "softcap": 3.0}])
def test_a_query_gets_the_same_bits_in_decode_in_chunks_and_in_prefill(codes, settings):
    """Long enough for keys to be cut into several ranges."""
    length = 2100
    for dtype in FLOATS:
        case = sequences((length, 50), dtype, codes, H=3, G=1)
        (whole,) = case.attend([(0, 0, length)], **settings)
        assert_right(case, 0, whole[2000:], 2000, **settings)
        for first, last in ((2099, 2100), (1023, 1024), (1024, 1025), (0, 1), (1030, 1100), (1900, 2100)):
            got, _ = case.attend([(0, first, last), (1, 3, 50)], **settings)
            assert torch.equal(got, whole[first:last])


@pytest.mark.parametrize("codes", CODES)
def test_a_query_gets_the_same_bits_among_many_that_decode(codes):
    """So many that kv heads are taken together, with keys in one range and in several."""
    for dtype in FLOATS:
        case = sequences((2100, 50), dtype, codes, H=6, G=3)
        long, short = case.attend([(0, 2000, 2100), (1, 0, 50)])
        parts = [(0, last - 1, last) for last in range(2061, 2101)] + [(1, last - 2, last) for last in range(2, 51)]
        for (request, first, last), got in zip(parts, case.attend(parts), strict=True):
            assert torch.equal(got, short[first:last] if request else long[first - 2000 : last - 2000])


def test_a_head_gets_the_same_bits_in_any_group():
    case = sequences((300,), torch.bfloat16, H=8, G=1)
    (whole,) = case.attend([(0, 0, 300)])
    for heads in (slice(3, 4), slice(1, 7)):
        part = Sequences([case.queries[0][:, heads]], case.caches, case.scales, case.tables, case.lengths)
        for first in (0, 299):
            assert torch.equal(part.attend([(0, first, 300)])[0], whole[first:, heads])


@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_before_every_window_are_not_read(dtype):
    case = sequences((200,), dtype)
    (expected,) = case.attend([(0, 190, 200)], window=20)
    case.tables[0, : 171 // 16] = -1
    assert torch.equal(case.attend([(0, 190, 200)], window=20)[0], expected)
    with pytest.raises(ValueError, match="block_tables"):
        case.attend([(0, 190, 200)], window=40)


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_scores(dtype):
    """Infinite scores are NaN as in torch; huge ones choose a key; where all are -infinity there is no mean, but with a sink it is 0."""
    case = sequences((40,), dtype, H=2, G=1)
    case.queries[0][:] = 0
    case.queries[0][39, 0, 0] = 3e4
    (got,) = case.attend([(0, 39, 40)])
    k = case.caches[0][case.tables[0].long()].flatten(1, 2).flatten(0, 1)[:40, 0]
    v = case.caches[1][case.tables[0].long()].flatten(1, 2).flatten(0, 1)[:40]
    assert torch.equal(got[0, 0], v[k.argmax()])
    case.caches[0][case.tables[0].long()] = 1
    case.queries[0][39, 0, 0] = -math.inf
    assert bool(case.attend([(0, 39, 40)])[0][0, 0].isnan().all())
    sinks = torch.tensor([0.5, 0.5])
    assert case.attend([(0, 39, 40)], sinks_H=sinks)[0][0, 0].tolist() == [0.0] * 16
    case.queries[0][39, 0, 0] = math.nan
    got = case.attend([(0, 38, 40)])[0]
    assert bool(got[1, 0].isnan().all()) and bool(got[0].isfinite().all()) and bool(got[1, 1].isfinite().all())


@pytest.mark.parametrize("codes", CODES[1:])
@pytest.mark.parametrize("dtype", FLOATS)
def test_written_codes_and_scales_are_the_contracts(dtype, codes):
    """Every tail length, and values whose quotients overflow, round to ties, or are not finite."""
    for D in [*range(1, 70), 255, 256, 257, 300]:
        k, v = torch.randn(7, 2, D).to(dtype), (torch.randn(7, 2, D) * 3).to(dtype)
        k[0] = 0
        k[1, 0] = -0.0
        k[2] = (torch.randn(2, D) * torch.finfo(dtype).smallest_normal / 4).to(dtype)
        k[3] = (torch.randint(-254, 255, (2, D)) / 2).to(dtype)
        k[3, :, 0] = 127
        k[4, 0, D // 2], k[4, 1, 0] = math.nan, math.inf
        k[5] = (torch.randn(2, D) * torch.finfo(dtype).max / 100).to(dtype)
        slots, results = torch.tensor([5, 0, -1, 11, 7, 2, 3]), []
        for write in (attention.write_kv, reference.write_kv):
            caches = [torch.full((3, 2, 4, D), 1.0).to(codes) for _ in range(2)]
            scales = [torch.full((3, 2, 4), 7.0) for _ in range(2)]
            write(k, v, *caches, slots, *scales)
            results.append([*(cache.view(torch.uint8) for cache in caches), *scales])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_every_code_is_read_as_its_value():
    """A value of e4m3 each, NaN too, through attention to a single key."""
    codes = torch.arange(256, dtype=torch.uint8)
    cache = codes.view(256, 1, 1, 1).expand(256, 1, 1, 2).contiguous().view(torch.float8_e4m3fn)
    for dtype in FLOATS:
        q, ones = torch.zeros(256, 1, 2, dtype=dtype), torch.ones(256, 1, 1)
        k = torch.zeros_like(cache.view(torch.uint8)).view(torch.float8_e4m3fn)
        got = attention.paged_attention(
            q, k, cache, torch.arange(256, dtype=torch.int32).view(256, 1), torch.arange(257, dtype=torch.int32),
            torch.ones(256, dtype=torch.int32), 1, 1, 1.0, True, None, None, None, ones, ones * 448,
        )  # fmt: skip
        expected = cache.view(256, 2).float().to(dtype)
        torch.testing.assert_close(got[:, 0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_blocks_are_copied_as_if_all_were_read_first(dtype):
    bytes_ = torch.randint(0, 2, (9, 3, 8), dtype=torch.uint8)
    for pairs in ([[0, 1], [1, 0]], [[0, 1], [1, 2], [2, 3]], [[4, 0], [5, 0 + 1]], [[3, 3]], [[0, 8], [0, 7]], []):
        src = bytes_.clone().view(dtype)
        expected = src.clone()
        for a, b in pairs:
            expected.view(torch.uint8)[b] = src.view(torch.uint8)[a]
        attention.copy_kv_blocks(src, src, torch.tensor(pairs, dtype=torch.int64).view(-1, 2))
        assert torch.equal(src.view(torch.uint8), expected.view(torch.uint8))


def test_blocks_are_copied_between_views_that_overlap():
    memory = torch.arange(40.0).view(10, 4)
    expected = memory.clone()
    expected[3:6] = memory[0:3]
    attention.copy_kv_blocks(memory[:8], memory[2:], torch.tensor([[0, 1], [1, 2], [2, 3]]))
    assert torch.equal(memory, expected)
