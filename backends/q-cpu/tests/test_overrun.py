"""No kernel touches a byte outside its tensors: each ends, or begins, at a page that no one may read or write.

An overrun ends the test process with a segmentation fault. So does a load that counts on alignment: tensors that end at a page begin
anywhere, and a third placement puts each some elements off the alignment of the others.

With ``--exhaustive`` the lengths are all of 1…1023; else those at which vectors, tiles and blocks end, and some that stand for the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import RULES
from q_core.testing.guard_pages import PAGE, GuardedRegion
from q_cpu.runtime import native

pytestmark = pytest.mark.usefixtures("isa")

ROOM = 256 * PAGE
SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)
u8, i8 = torch.uint8, torch.int8
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Place = Callable[[Tensor], Tensor]


_regions = [GuardedRegion(ROOM) for _ in range(16)]


@pytest.fixture(params=["end", "begin", "misaligned"])
def placement(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(placement: str) -> Callable[[], Place]:
    """A placer of tensors in guarded memory, fresh for each call of a kernel."""

    def fresh() -> Place:
        free = enumerate(_regions, start=1)

        def one(tensor: Tensor) -> Tensor:
            number, region = next(free)
            return region.place(tensor, {"end": None, "begin": 0, "misaligned": number}[placement])

        return one

    return fresh


# Lengths around those of vectors, chunks, tiles and blocks.
MANY_LENGTHS = (*range(1, 132), *range(255, 258), *range(511, 514), 767, 1000, 1023)
FEW_LENGTHS = (*range(1, 36), *range(63, 66), *range(127, 130), 256, 511, 1023)
LONG_LENGTHS = (1024, 1025, 4095, 4097)


@pytest.fixture
def lengths(placement: str, exhaustive: bool) -> Sequence[int]:
    if placement == "end":
        return range(1, 1024) if exhaustive else MANY_LENGTHS
    return MANY_LENGTHS if exhaustive else FEW_LENGTHS


def tokens_and_rows(K: int) -> Iterator[tuple[int, int]]:
    """Numbers of tokens and weight rows to try with a length: few and many, more for lengths of which whole blocks are made."""
    chosen = random.Random(K)
    for _ in range(4 if K % 32 == 0 else 1):
        yield chosen.choice((1, 2, 3, 4, 5, 7, 8, 9, 17)), chosen.randint(1, 35)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_blockwise(place, lengths, dtype):
    for n in (*lengths, *LONG_LENGTHS):
        p, blocks = place(), -(-n // 32)
        codes, absmax, book = p(torch.zeros(n, dtype=u8)), p(torch.zeros(blocks)), p(SIGNED)
        native.quantize_blockwise(p(torch.randn(n).to(dtype)), book, 32, codes, absmax)
        native.dequantize_blockwise(codes, absmax, book, 32, p(torch.zeros(n, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("int4", 128), ("mxfp4", 32), ("nvfp4", 16)])
def test_quantize_4bit(place, lengths, quant_type, blocksize, dtype):
    for n in (*lengths, *LONG_LENGTHS):
        p, blocks = place(), -(-n // blocksize)
        packed, absmax = p(torch.zeros((n + 1) // 2, dtype=u8)), p(torch.zeros(blocks))
        native.quantize_4bit(p(torch.randn(n).to(dtype)), blocksize, quant_type, packed, absmax)
        native.dequantize_4bit(packed, absmax, blocksize, quant_type, p(torch.zeros(n, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_quantize_int8_rowwise(place, lengths, threshold, dtype):
    for K in (*lengths, *LONG_LENGTHS):
        p, T = place(), 3
        q, absmax, outliers = p(torch.zeros(T, K, dtype=i8)), p(torch.zeros(T)), p(torch.zeros(K, dtype=torch.bool))
        native.quantize_int8_rowwise(p(torch.randn(T, K).to(dtype)), threshold, q, absmax, outliers)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_4bit(place, lengths, dtype):
    for K in lengths:
        for (T, N), blocksize in product(tokens_and_rows(K), (16, 64)):
            p = place()
            packed, absmax = p(torch.randint(0, 256, (-(-N * K // 2),), dtype=u8)), p(torch.rand(-(-N * K // blocksize)))
            x, bias, out = p(torch.randn(T, K).to(dtype)), p(torch.randn(N).to(dtype)), p(torch.zeros(T, N, dtype=dtype))
            native.gemm_4bit(x, packed, absmax, blocksize, "fp4", T, N, K, bias, out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_4bit_int8(place, lengths, dtype):
    for K in lengths:
        for T, N in tokens_and_rows(K):
            p = place()
            packed, absmax = p(torch.randint(0, 256, (-(-N * K // 2),), dtype=u8)), p(torch.rand(-(-N * K // 32)))
            x, bias, out = p(torch.randn(T, K).to(dtype)), p(torch.randn(N)), p(torch.zeros(T, N, dtype=dtype))
            native.gemm_4bit_int8(x, packed, absmax, 32, "nf4", T, N, K, bias, out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm(place, lengths, dtype):
    for K in lengths:
        for T, N in tokens_and_rows(K):
            p = place()
            x, w, bias = p(torch.randn(T, K).to(dtype)), p(torch.randn(N, K).to(dtype)), p(torch.randn(N).to(dtype))
            native.gemm(x, w, T, N, K, bias, p(torch.zeros(T, N, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_gemm(place, lengths, dtype):
    for K in lengths:
        for T, N in tokens_and_rows(K):
            p = place()
            a, b = p(torch.randint(-128, 128, (T, K), dtype=i8)), p(torch.randint(-128, 128, (N, K), dtype=i8))
            out = p(torch.zeros(T, N, dtype=dtype))
            native.int8_gemm(a, b, p(torch.rand(T)), p(torch.rand(N)), T, N, K, p(torch.randn(N)), out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_int8_weight(place, lengths, dtype):
    for K in lengths:
        for T, N in tokens_and_rows(K):
            p = place()
            x, w = p(torch.randn(T, K).to(dtype)), p(torch.randint(-128, 128, (N, K), dtype=i8))
            native.gemm_int8_weight(x, w, p(torch.rand(N)), T, N, K, p(torch.randn(N)), p(torch.zeros(T, N, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", RULES)
def test_optimizer_steps(place, lengths, dtype, name):
    kept = [f"state{i}" in RULES[name].names(0.9) for i in (1, 2, 3)]
    rest = (0.1, 0.9, 0.99, 0.9, 1.0, 1e-8, 0.1, 0.0, False, 0.1, 1)
    for n in (*lengths, *LONG_LENGTHS):
        p, blocks = place(), -(-n // 32)
        param, grad = p(torch.randn(n).to(dtype)), p(torch.randn(n).to(dtype))
        codes = [[p(torch.zeros(n, dtype=u8))] if keeps else [] for keeps in kept]
        scales = [[p(torch.zeros(blocks))] if keeps else [] for keeps in kept]
        native.optimizer_step_8bit(name, [param], [grad], *codes, *scales, [], p(SIGNED), p(UNSIGNED), *rest, 32)
        p = place()
        param, grad = p(torch.randn(n).to(dtype)), p(torch.randn(n).to(dtype))
        native.optimizer_step_32bit(name, [param], [grad], *([p(torch.zeros(n))] if keeps else [] for keeps in kept), [], *rest)


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms(place, lengths, dtype):
    for K in (*lengths, *LONG_LENGTHS):
        p, rows = place(), 1 + K % 3
        x, weight = p(torch.randn(rows, K).to(dtype)), p(torch.ones(K, dtype=dtype))
        total, out = p(torch.zeros(rows, K, dtype=dtype)), p(torch.zeros(rows, K, dtype=dtype))
        native.rms_norm(x, weight, 1e-6, rows, K, out)
        native.add_rms_norm(x, p(torch.randn(rows, K).to(dtype)), weight, 1e-6, rows, K, total, out)
        native.silu_and_mul(p(torch.randn(rows, 2 * K).to(dtype)), rows, K, p(torch.zeros(rows, K, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(place, lengths, dtype, interleaved):
    for D in lengths:
        p, F = place(), max(0, D // 2 - D % 3 // 2)
        q, k, positions = p(torch.randn(3, 2, D).to(dtype)), p(torch.randn(3, 1, D).to(dtype)), p(torch.tensor([0, 4, 2]))
        cos, sin = p(torch.randn(5, F)), p(torch.randn(5, F))
        out = p(torch.zeros(3, 2, D, dtype=dtype)), p(torch.zeros(3, 1, D, dtype=dtype))
        native.rotary_embedding(q, k, positions, cos, sin, interleaved, 3, 2, 1, D, 5, F, *out)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codes", [None, i8, u8])
def test_attention(place, lengths, dtype, codes):
    """Every head dimension, and sequences that end anywhere in a block and in a tile of keys."""
    for D in lengths:
        p, S, queries, length = place(), 1 + D % 7, 1 + D % 4, 5 + D % 52
        blocks = -(-length // S)
        k, v = (p(torch.randn(length, 2, D).to(dtype)) for _ in range(2))
        caches = [p(torch.zeros(blocks, 2, S, D, dtype=codes or dtype)) for _ in range(2)]
        scales = [p(torch.zeros(blocks, 2, S)) if codes else None for _ in range(2)]
        native.write_kv(k, v, *caches, p(torch.arange(length)), *scales, length, blocks, 2, S, D)
        tables, start = p(torch.arange(blocks, dtype=torch.int32)), p(torch.tensor([0, queries], dtype=torch.int32))
        out, seq_lens = p(torch.zeros(queries, 4, D, dtype=dtype)), p(torch.tensor([length], dtype=torch.int32))
        native.paged_attention(
            p(torch.randn(queries, 4, D).to(dtype)), *caches, tables, start, seq_lens, queries, length, 0.1, True, 0, 0.0, None, *scales,
            queries, 4, 1, blocks, blocks, 2, S, D, out,
        )  # fmt: skip


def test_copy_kv_blocks(place, lengths):
    for size in (*lengths, *LONG_LENGTHS):
        p, pairs = place(), torch.tensor([[0, 3], [2, 0]])
        native.copy_kv_blocks(p(torch.zeros(3, size, dtype=u8)), p(torch.zeros(4, size, dtype=u8)), p(pairs), 2, 3, 4, size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_route_topk(place, lengths, dtype, sigmoid):
    for E in lengths:
        p, T, k = place(), 1 + E % 5, 1 + (E - 1) % 9
        weights, ids = p(torch.zeros(T, k)), p(torch.zeros(T, k, dtype=torch.int32))
        native.route_topk(p(torch.randn(T, E).to(dtype)), T, E, k, sigmoid, True, weights, ids)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["dense", "int8", "fp8", "nf4"])
def test_fused_moe(place, lengths, dtype, format):
    """Each length as that of the tokens or of what is hidden, with another for the other."""
    E, k, blocksize = 3, 2, 64
    for length in lengths:
        other = 1 + length % 37
        K, N = (length, other) if length % 2 else (other, length)
        p, (T, _) = place(), next(tokens_and_rows(length))
        sizes = (E, 2 * N, K), (E, K, N)
        if format == "dense":
            weights, scales = [torch.randn(size).to(dtype) for size in sizes], [None, None]
        elif format == "nf4":
            weights = [torch.randint(0, 256, (E, -(-rows * columns // 2)), dtype=u8) for _, rows, columns in sizes]
            scales = [torch.rand(E, -(-rows * columns // blocksize)) for _, rows, columns in sizes]
        else:
            weights = [torch.randint(0, 127, size).to(i8 if format == "int8" else u8) for size in sizes]
            scales = [torch.rand(size[:2]) for size in sizes]
        ids = torch.randint(-1, E, (T, k), dtype=torch.int32)
        native.fused_moe(
            p(torch.randn(T, K).to(dtype)), *map(p, weights), p(torch.rand(T, k)), p(ids), format, T, K, N, E, k,
            *(None if scale is None else p(scale) for scale in scales), blocksize, p(torch.zeros(T, K, dtype=dtype)),
        )  # fmt: skip
