"""Window, softcap, sinks, quantized caches and block copies, each against a formulation of its own, query by query in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from q_core import ops, use_backends

H, G, D, S = 6, 2, 16, 4
QUERY_LENS, SEQ_LENS = (5, 1, 3), (5, 18, 9)


@pytest.fixture(autouse=True)
def reference_only():  # type: ignore[no-untyped-def]
    with use_backends("reference"):
        yield


@dataclass
class Paged:
    """Three requests in a paged cache, and their keys and values in plain tensors [L, G, D]."""

    arguments: tuple[Tensor, ...]
    settings: dict[str, Any]
    keys: list[Tensor]
    values: list[Tensor]


def paged(codes: torch.dtype | None = None) -> Paged:
    generator = torch.Generator().manual_seed(0)
    shape = (12, G, S, D)
    k_cache, v_cache = (torch.zeros(shape, dtype=codes or torch.float32) for _ in range(2))
    scales: dict[str, Any] = {}
    if codes is not None:
        scales = {"k_scale_BGS": torch.full(shape[:3], float("nan")), "v_scale_BGS": torch.full(shape[:3], float("nan"))}
    order = torch.randperm(12, generator=generator)
    tables = torch.zeros(3, 5, dtype=torch.int32)
    keys, values, used = [], [], 0
    for r, length in enumerate(SEQ_LENS):
        blocks = order[used : used + math.ceil(length / S)]
        used += len(blocks)
        tables[r, : len(blocks)] = blocks
        position = torch.arange(length)
        k, v = (torch.randn(length, G, D, generator=generator) for _ in range(2))
        ops.write_kv(k, v, k_cache, v_cache, blocks[position // S] * S + position % S, **scales)
        keys.append(k)
        values.append(v)
    q = torch.randn(sum(QUERY_LENS), H, D, generator=generator)
    start = torch.tensor((0, *QUERY_LENS)).cumsum(0).to(torch.int32)
    lengths = torch.tensor(SEQ_LENS, dtype=torch.int32)
    settings = {"max_query_len": max(QUERY_LENS), "max_seq_len": max(SEQ_LENS), **scales}
    return Paged((q, k_cache, v_cache, tables, start, lengths), settings, keys, values)


def by_hand(case: Paged, *, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """One query and head after the other."""
    q, start = case.arguments[0].double(), case.arguments[4].tolist()
    out = torch.empty(q.shape, dtype=torch.float64)
    for r, length in enumerate(SEQ_LENS):
        for row in range(start[r], start[r + 1]):
            position = length - (start[r + 1] - row)
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(H):
                k, v = (t[r][first : position + 1, head // (H // G)].double() for t in (case.keys, case.values))
                scores = k @ q[row, head] / math.sqrt(D)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() + (0.0 if sinks is None else sinks[head].double().exp())
                out[row, head] = (weights / total) @ v
    return out


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"window": 1},
        {"window": 4},
        {"window": 1000},
        {"softcap": 0.5},
        {"sinks": torch.linspace(-2, 3, H)},
        {"window": 3, "softcap": 2.0, "sinks": torch.linspace(-2, 3, H)},
    ],
)
def test_variants(variant: dict[str, Any]) -> None:
    case = paged()
    settings = {"sinks_H" if name == "sinks" else name: value for name, value in variant.items()}
    got = ops.paged_attention(*case.arguments, **case.settings, **settings)
    torch.testing.assert_close(got, by_hand(case, **variant).float())


def test_nothing_before_the_window_is_read() -> None:
    """A freed block may hold anything, NaN too."""
    case = paged()
    q, k_cache, v_cache, tables, *rest = case.arguments
    expected = ops.paged_attention(*case.arguments, **case.settings, window=3)
    for cache in (k_cache, v_cache):
        cache[tables[1, 0].long()] = float("nan")
    got = ops.paged_attention(q, k_cache, v_cache, tables, *rest, **case.settings, window=3)
    assert torch.equal(got[5:6], expected[5:6])


@pytest.mark.parametrize(("codes", "peak", "step"), [(torch.int8, 127.0, 1 / 254), (torch.float8_e4m3fn, 448.0, 16 / 448)])
def test_a_quantized_cache_holds_what_was_written_within_the_formats_bound(codes: torch.dtype, peak: float, step: float) -> None:
    case = paged(codes)
    _, k_cache, _, tables, *_ = case.arguments
    scale = case.settings["k_scale_BGS"]
    for r, length in enumerate(SEQ_LENS):
        for position in range(length):
            block, slot = int(tables[r, position // S]), position % S
            k = case.keys[r][position]
            torch.testing.assert_close(scale[block, :, slot], k.abs().amax(-1), rtol=0, atol=0)
            held = k_cache[block, :, slot].double() * scale[block, :, slot, None].double() / peak
            error = (held - k).abs() / k.abs().amax(-1, keepdim=True)
            assert error.max() <= step * (1 + 1e-6), "half a step at the top"
            case.keys[r][position] = held
            held_v = case.arguments[2][block, :, slot].double() * case.settings["v_scale_BGS"][block, :, slot, None].double() / peak
            case.values[r][position] = held_v
    got = ops.paged_attention(*case.arguments, **case.settings, window=7)
    torch.testing.assert_close(got, by_hand(case, window=7).float(), rtol=1e-4, atol=1e-5)


def test_a_quantized_cache_skips_negative_slots_and_poisons_what_is_not_finite() -> None:
    cache, scale = torch.full((2, 1, 2, 4), 5, dtype=torch.int8), torch.ones(2, 1, 2)
    k = torch.ones(3, 1, 4)
    k[2, 0, 1] = float("inf")
    ops.write_kv(k, k, cache, cache.clone(), torch.tensor([-1, 3, 0]), k_scale_BGS=scale, v_scale_BGS=scale.clone())
    assert cache[:, 0, :, 0].tolist() == [[0, 5], [5, 127]]
    assert scale[:, 0].tolist() == [[float("inf"), 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_copy_kv_blocks(dtype: torch.dtype) -> None:
    src = torch.arange(5 * 8).view(5, 1, 2, 4).to(torch.uint8).view(5, 1, 2, 4).float().to(dtype)
    dst = torch.zeros(7, 1, 2, 4).to(dtype)
    ops.copy_kv_blocks(src, dst, torch.tensor([[4, 0], [1, 6]]))
    assert torch.equal(dst[[0, 6]].float(), src[[4, 1]].float()) and not dst[1:6].float().any()


def test_blocks_swap_within_one_cache_as_if_read_first() -> None:
    cache = torch.arange(3.0)[:, None].expand(3, 4).contiguous()
    ops.copy_kv_blocks(cache, cache, torch.tensor([[0, 1], [1, 2], [2, 0]]))
    assert cache[:, 0].tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ValueError, "window is 0, expected 1 or more"),
        ({"window": 2, "causal": False}, ValueError, "window is 2, expected 1 or more, with causal=True"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"sinks_H": torch.zeros(5)}, ValueError, r"sinks_H has shape \[5\], expected \[6\]"),
        ({"sinks_H": torch.zeros(6, dtype=torch.float16)}, TypeError, "sinks_H has dtype float16"),
        ({"k_scale_BGS": torch.ones(12, 2, 4)}, ValueError, "k_scale_BGS is 'given', expected None with a cache of float32"),
    ],
)
def test_bad_settings(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = paged()
    with pytest.raises(error, match=message):
        ops.paged_attention(*case.arguments, **(case.settings | change))


def test_a_quantized_cache_needs_its_scales() -> None:
    case = paged(torch.int8)
    with pytest.raises(ValueError, match=r"k_scale_BGS is None, expected float32 \[B, G, S\] with a cache of int8"):
        ops.paged_attention(*case.arguments, max_query_len=5, max_seq_len=18)
    with pytest.raises(ValueError, match=r"dst has shape \[3, 5\], expected \[B', ...\] with src's block shape \[4\]"):
        ops.copy_kv_blocks(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(1, 2, dtype=torch.int64))
