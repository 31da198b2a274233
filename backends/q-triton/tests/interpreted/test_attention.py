"""The paged cache and attention over it, in the interpreter, against float64: what the conformance suite's short sequences don't reach."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from q_core.reference import attention as reference
from q_core.specs import bounds, record_of
from q_core.testing.agreement import disagreements_of
from q_triton import attention, tiles
from q_triton.environment import interpreted_target
from q_triton.launch import Launch, recorded

CODES = (None, torch.int8, torch.float8_e4m3fn)
KINDS = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.int8),
    (torch.float16, torch.float8_e4m3fn),
)
"""Dtypes of queries and of a cache."""
ATTENTION = record_of("paged_attention")
EVERYTHING: dict[str, Any] = {"window": 300, "softcap": 5.0, "sinks_H": torch.linspace(-2, 3, 4)}
CASES = [*((*kind, EVERYTHING) for kind in KINDS), (torch.bfloat16, None, {}), (torch.bfloat16, None, {"causal": False})]


def call(
    query_lens: tuple[int, ...],
    seq_lens: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    codes: torch.dtype | None = None,
    *,
    H: int = 4,
    G: int = 2,
    D: int = 16,
    S: int = 16,
    **settings: Any,
) -> dict[str, Any]:
    """Random requests; slots that hold no token are NaN, and table entries beyond a sequence lead nowhere."""
    R, widths = len(seq_lens), [math.ceil(length / S) for length in seq_lens]
    B = sum(widths) + 1
    order = torch.randperm(B).to(torch.int32)
    tables = torch.full((R, max(widths) + 1), 2**30, dtype=torch.int32)
    caches = [torch.full((B, G, S, D), math.nan).to(codes or dtype) for _ in "kv"]
    scales = [torch.full((B, G, S), math.nan) if codes else None for _ in "kv"]
    used = 0
    for r, (length, width) in enumerate(zip(seq_lens, widths, strict=True)):
        tables[r, :width] = order[used : used + width]
        used += width
        position = torch.arange(length)
        slots = tables[r, position // S].long() * S + position % S
        reference.write_kv(*(torch.randn(length, G, D).to(dtype) for _ in "kv"), *caches, slots, *scales)
    start = torch.tensor((0, *query_lens)).cumsum(0).to(torch.int32)
    return {
        "q_THD": torch.randn(sum(query_lens), H, D).to(dtype), "k_cache_BGSD": caches[0], "v_cache_BGSD": caches[1],
        "block_tables": tables, "query_start": start, "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "max_query_len": max(query_lens), "max_seq_len": max(seq_lens), "scale": D**-0.5, "causal": True, "window": None,
        "softcap": None, "sinks_H": None, "k_scale_BGS": scales[0], "v_scale_BGS": scales[1],
    } | settings  # fmt: skip


def attend(arguments: dict[str, Any]) -> Tensor:
    return attention.paged_attention(*(arguments[name] for name in ATTENTION.arguments))


def assert_right(arguments: dict[str, Any]) -> None:
    """The result is within the surface's bound of the float64 reference."""
    assert not list(map(str, disagreements_of(ATTENTION, attention.paged_attention, arguments)))


def launches(arguments: dict[str, Any]) -> list[Launch]:
    """What a call launches."""
    seen: list[Launch] = []
    with recorded(seen.append):
        attend(arguments)
    return seen


def kernels(arguments: dict[str, Any]) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches(arguments)]


@pytest.mark.parametrize(("dtype", "codes", "settings"), CASES)
def test_decode_over_many_splits(dtype, codes, settings):
    case = call((1, 1), (500, 1), dtype, codes, G=1, **settings)
    assert kernels(case) == ["decode", "merge"]
    assert_right(case)


@pytest.mark.parametrize(("dtype", "codes", "settings"), CASES)
def test_prefill(dtype, codes, settings):
    case = call((40,), (260,), dtype, codes, G=1, **settings)
    assert kernels(case) == ["prefill"]
    assert_right(case)


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
@pytest.mark.parametrize("query_lens", [(90, 1, 0, 7, 40), (1, 1, 60), (0, 64, 0, 2, 0), (33, 34, 35)])
def test_prefill_and_decode_in_one_batch(query_lens, settings):
    case = call(query_lens, tuple(length + 97 * (1 + r % 2) for r, length in enumerate(query_lens)), G=1, **settings)
    assert kernels(case) == ["decode", "merge", "prefill"]
    assert_right(case)


def test_a_batch_of_equal_parts_has_no_request_to_decode():
    case = call((40, 40), (50, 200))
    assert kernels(case) == ["prefill"]
    assert_right(case)


def test_a_prefill_in_chunks_is_the_whole():
    whole = call((90,), (90,), G=1, softcap=9.0)
    parts = []
    for first, last in ((0, 34), (34, 35), (35, 38), (38, 90)):
        parts.append(attend(whole | {
            "q_THD": whole["q_THD"][first:last], "query_start": torch.tensor([0, last - first], dtype=torch.int32),
            "seq_lens": torch.tensor([last], dtype=torch.int32), "max_query_len": last - first, "max_seq_len": last,
        }))  # fmt: skip
    exact = ATTENTION.reference(*({**whole, "q_THD": whole["q_THD"].double()}[name] for name in ATTENTION.arguments))
    assert bool(((torch.cat(parts).double() - exact).abs() <= bounds.paged_attention(whole, exact)).all())


@pytest.mark.parametrize("window", [1, 63, 64, 65, 200, 1000])
def test_window_over_the_edges_of_splits_and_tiles(window):
    assert_right(call((1, 4), (400, 300), G=1, window=window))
    assert_right(call((50,), (200,), G=1, window=window))


def test_a_query_to_which_a_whole_split_is_hidden():
    """The last of three splits has the last key alone, which only the last query sees."""
    BLOCK_N = launches(call((2,), (300,)))[0].tile.blocks["BLOCK_N"]
    case = call((2,), (4 * BLOCK_N + 1,))
    assert launches(case)[0].arguments["splits"] == 3
    assert_right(case)
    assert_right(case | {"sinks_H": torch.tensor([-math.inf, -3.0, 0.0, 9.0])})


@pytest.mark.parametrize(("H", "G"), [(8, 1), (5, 5), (7, 1), (12, 2), (40, 1)])
def test_heads_of_a_group_are_rows_of_one_program(H, G):
    assert_right(call((1, 2), (100, 60), H=H, G=G))
    assert_right(call((34,), (40,), H=H, G=G))


@pytest.mark.parametrize(("D", "S"), [(1, 1), (5, 3), (33, 16), (64, 7), (80, 32), (128, 16), (200, 16), (256, 5)])
@pytest.mark.parametrize("codes", CODES)
def test_every_kind_of_head_dim_and_block(D, S, codes):
    case = call((1, 50), (40, 60), torch.bfloat16, codes, G=1, D=D, S=S)
    assert {"decode", "prefill"} <= set(kernels(case))
    assert_right(case)


def test_loose_bounds_and_padding():
    case = call((1, 3, 0, 0), (33, 17, 1, 1))
    tables = torch.cat((case["block_tables"], torch.full((4, 60), -1, dtype=torch.int32)), 1)
    loose = case | {"block_tables": tables, "max_query_len": 9, "max_seq_len": 1000}
    assert launches(loose)[0].arguments["splits"] > 1
    assert_right(loose)
    assert_right(case | {"seq_lens": torch.tensor([33, 17, 0, 0], dtype=torch.int32)})


@pytest.mark.parametrize("query_lens", [(1, 1), (40, 1)])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
def test_scale_of_any_sign(query_lens, scale):
    assert_right(call(query_lens, (70, 90), scale=scale))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("query_lens", [(1,), (70,)])
def test_nan_in_a_key_or_a_value_reaches_the_result(query_lens, codes):
    for name in ("k", "v"):
        case = call(query_lens, (170,), codes=codes)
        spoilt = case["k_cache_BGSD" if name == "k" else "v_cache_BGSD"] if codes is None else case[f"{name}_scale_BGS"]
        spoilt[case["block_tables"][0, 0].long(), 1, 3] = math.nan
        assert bool(attend(case)[:, 2:].isnan().any(-1).all())
        assert_right(case)


@pytest.fixture
def with_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets a kernel have one tile of any table."""

    def use(kernel: str, tile: tiles.Tile) -> None:
        target = interpreted_target()
        assert target is not None
        tiles.use_tuned(target, {kernel: [dataclasses.replace(tile, up_to=None)]})

    monkeypatch.setattr(tiles, "_tuned", {})
    yield use
    tiles._source.cache_clear()


def known(kernel: str) -> list[tiles.Tile]:
    for backend in ("q_cuda", "q_rocm", "q_xpu"):
        importlib.import_module(f"{backend}.tiles")
    return tiles.KERNELS[kernel].known()


@pytest.mark.parametrize(
    ("kind", "dtype", "codes"),
    [("", torch.bfloat16, None), ("codes", torch.bfloat16, torch.int8), ("float32", torch.float32, None)],
)
def test_every_tile(with_tile, kind, dtype, codes):
    for table, lens in ((attention.DECODE, ((1, 3), (300, 150))), (attention.PREFILL, ((40,), (150,)))):
        kernel = table[kind].kernel
        for tile in known(kernel):
            with_tile(kernel, tile)
            case = call(*lens, dtype, codes, G=1, D=24, window=100)
            assert launches(case)[0].tile.blocks["BLOCK_N"] == tile.blocks["BLOCK_N"]
            assert_right(case)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 7, 3), (5, 2, 16, 8), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128])
def test_copies_of_blocks_of_any_size(shape, dtype):
    pairs = torch.tensor([[4, 1], [0, 4], [1, 0]])
    src = (torch.randn(shape) * 4).to(dtype)
    for offset in (0, 1):  # what a cache's memory is aligned to
        dst = torch.zeros(src.numel() + offset, dtype=dtype)[offset:].view(shape)
        attention.copy_kv_blocks(src, dst, pairs)
        assert torch.equal(dst, torch.stack((src[1], src[4], torch.zeros_like(src[0]), torch.zeros_like(src[0]), src[0])))


def test_copies_within_one_memory_read_before_they_write():
    cache = torch.randn(6, 2, 4, 8)
    order = torch.tensor([3, 0, 1, 5, 2, 4])
    expected = cache[order]
    attention.copy_kv_blocks(cache, cache, torch.stack((order, torch.arange(6)), 1))
    assert torch.equal(cache, expected)
    expected = torch.cat((cache[:2], cache[:4]))
    attention.copy_kv_blocks(cache[:4], cache[2:], torch.stack((torch.arange(4), torch.arange(4)), 1))
    assert torch.equal(cache, expected)
