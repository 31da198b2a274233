"""No kernel touches a byte outside its tensors: each ends, or begins, at a page that no one may read or write.

An overrun ends the test process with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import RULES
from q_cpu.runtime import native

pytestmark = pytest.mark.usefixtures("isa")

PAGE = mmap.PAGESIZE
ROOM = 64 * PAGE
SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)
u8, i8 = torch.uint8, torch.int8
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

Place = Callable[[Tensor], Tensor]


class GuardedRegion:
    """Memory between two forbidden pages, for one tensor at a time."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ROOM + 2 * PAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + PAGE
        for page in (self._start - PAGE, self._start + ROOM):
            if _libc.mprotect(page, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, tensor: Tensor, at_end: bool) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        assert size <= ROOM
        if size == 0:
            return tensor
        address = self._start + (ROOM - size if at_end else 0)
        placed = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=tensor.dtype).view(tensor.shape)
        return placed.copy_(tensor)


_regions = [GuardedRegion() for _ in range(16)]


@pytest.fixture(params=["end", "begin"])
def place(request: pytest.FixtureRequest) -> Callable[[], Place]:
    """A placer of tensors in guarded memory, fresh for each call of a kernel."""

    def fresh() -> Place:
        free = iter(_regions)
        return lambda tensor: next(free).place(tensor, request.param == "end")

    return fresh


# Every tail length that a vector, a chunk or a block can have, and then some of each longer kind.
LENGTHS = [*range(1, 132), *range(250, 262), *range(505, 520), 767, 1000, 1023, 1024, 1025, 4095, 4097]


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_blockwise(place, dtype):
    for n in LENGTHS:
        p, blocks = place(), -(-n // 32)
        codes, absmax, book = p(torch.zeros(n, dtype=u8)), p(torch.zeros(blocks)), p(SIGNED)
        native.quantize_blockwise(p(torch.randn(n).to(dtype)), book, 32, codes, absmax)
        native.dequantize_blockwise(codes, absmax, book, 32, p(torch.zeros(n, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_4bit(place, dtype):
    for n in LENGTHS:
        p, blocks = place(), -(-n // 64)
        packed, absmax = p(torch.zeros((n + 1) // 2, dtype=u8)), p(torch.zeros(blocks))
        native.quantize_4bit(p(torch.randn(n).to(dtype)), 64, "nf4", packed, absmax)
        native.dequantize_4bit(packed, absmax, 64, "nf4", p(torch.zeros(n, dtype=dtype)))


@pytest.mark.parametrize(("quant_type", "blocksize"), [("int4", 128), ("mxfp4", 32), ("nvfp4", 16)])
def test_quantize_4bit_in_other_blocks(place, quant_type, blocksize):
    for n in LENGTHS:
        p, blocks = place(), -(-n // blocksize)
        packed, absmax = p(torch.zeros((n + 1) // 2, dtype=u8)), p(torch.zeros(blocks))
        native.quantize_4bit(p(torch.randn(n)), blocksize, quant_type, packed, absmax)
        native.dequantize_4bit(packed, absmax, blocksize, quant_type, p(torch.zeros(n)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_int8_rowwise(place, dtype):
    for K in LENGTHS:
        T = 3
        for threshold in (0.0, 2.0):
            p = place()
            native.quantize_int8_rowwise(
                p(torch.randn(T, K).to(dtype)),
                threshold,
                p(torch.zeros(T, K, dtype=i8)),
                p(torch.zeros(T)),
                p(torch.zeros(K, dtype=torch.bool)),
            )


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_4bit(place, dtype):
    for K in [*range(1, 70), *range(72, 140, 8), 511, 512, 513, 529, 1023, 1032]:
        for blocksize, T in ((16, 1), (32, 1 + K % 8), (64, 10)):
            N = 1 + K % 11
            p = place()
            packed = p(torch.randint(0, 256, (math.ceil(N * K / 2),), dtype=u8))
            absmax = p(torch.rand(-(-N * K // blocksize)))
            x, bias, out = p(torch.randn(T, K).to(dtype)), p(torch.randn(N).to(dtype)), p(torch.zeros(T, N, dtype=dtype))
            native.gemm_4bit(x, packed, absmax, blocksize, "fp4", T, N, K, bias, out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm(place, dtype):
    for K in [*range(1, 132), 511, 512, 513, 529, 1023]:
        T, N = 1 + K % 9, 1 + K % 7
        p = place()
        x, w, bias = p(torch.randn(T, K).to(dtype)), p(torch.randn(N, K).to(dtype)), p(torch.randn(N).to(dtype))
        native.gemm(x, w, T, N, K, bias, p(torch.zeros(T, N, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_gemm(place, dtype):
    for K in LENGTHS[:150]:
        T, N = 1 + K % 6, 1 + K % 7
        p = place()
        a, b = p(torch.randint(-128, 128, (T, K), dtype=i8)), p(torch.randint(-128, 128, (N, K), dtype=i8))
        native.int8_gemm(a, b, p(torch.rand(T)), p(torch.rand(N)), T, N, K, p(torch.randn(N)), p(torch.zeros(T, N, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_int8_weight(place, dtype):
    for K in LENGTHS[:150]:
        T, N = 1 + K % 6, 1 + K % 7
        p = place()
        x, w = p(torch.randn(T, K).to(dtype)), p(torch.randint(-128, 128, (N, K), dtype=i8))
        native.gemm_int8_weight(x, w, p(torch.rand(N)), T, N, K, p(torch.randn(N)), p(torch.zeros(T, N, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_4bit_int8(place, dtype):
    for K in [*range(1, 70), 96, 128, 511, 512, 513, 544, 1023, 1056]:
        T, N = 1 + K % 6, 1 + K % 11
        p = place()
        packed = p(torch.randint(0, 256, (math.ceil(N * K / 2),), dtype=u8))
        absmax = p(torch.rand(-(-N * K // 32)))
        x, bias, out = p(torch.randn(T, K).to(dtype)), p(torch.randn(N)), p(torch.zeros(T, N, dtype=dtype))
        native.gemm_4bit_int8(x, packed, absmax, 32, "nf4", T, N, K, bias, out)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["ademamix", "lamb", "lars"])
def test_optimizer_steps(place, dtype, name):
    """The rule with the most states, and those with a pass for their norms."""
    kept = [f"state{i}" in RULES[name].names(0.9) for i in (1, 2, 3)]
    rest = (0.1, 0.9, 0.99, 0.9, 1.0, 1e-8, 0.1, 0.0, False, 0.1, 1)
    for n in LENGTHS:
        p, blocks = place(), -(-n // 32)
        param, grad = p(torch.randn(n).to(dtype)), p(torch.randn(n).to(dtype))
        codes = [[p(torch.zeros(n, dtype=u8))] if keeps else [] for keeps in kept]
        scales = [[p(torch.zeros(blocks))] if keeps else [] for keeps in kept]
        native.optimizer_step_8bit(name, [param], [grad], *codes, *scales, [], p(SIGNED), p(UNSIGNED), *rest, 32)
        p = place()
        param, grad = p(torch.randn(n).to(dtype)), p(torch.randn(n).to(dtype))
        native.optimizer_step_32bit(name, [param], [grad], *([p(torch.zeros(n))] if keeps else [] for keeps in kept), [], *rest)


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms(place, dtype):
    for K in LENGTHS[:150]:
        p, rows = place(), 1 + K % 3
        x, weight = p(torch.randn(rows, K).to(dtype)), p(torch.ones(K, dtype=dtype))
        total, out = p(torch.zeros(rows, K, dtype=dtype)), p(torch.zeros(rows, K, dtype=dtype))
        native.rms_norm(x, weight, 1e-6, rows, K, out)
        native.add_rms_norm(x, p(torch.randn(rows, K).to(dtype)), weight, 1e-6, rows, K, total, out)
        native.silu_and_mul(p(torch.randn(rows, 2 * K).to(dtype)), rows, K, p(torch.zeros(rows, K, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(place, dtype, interleaved):
    for D in range(1, 80):
        p, F = place(), D // 2 - D % 3 // 2
        q, k, positions = p(torch.randn(3, 2, D).to(dtype)), p(torch.randn(3, 1, D).to(dtype)), p(torch.tensor([0, 4, 2]))
        cos, sin = p(torch.randn(5, F)), p(torch.randn(5, F))
        out = p(torch.zeros(3, 2, D, dtype=dtype)), p(torch.zeros(3, 1, D, dtype=dtype))
        native.rotary_embedding(q, k, positions, cos, sin, interleaved, 3, 2, 1, D, 5, F, *out)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codes", [None, i8, u8])
def test_attention(place, dtype, codes):
    for D in [*range(1, 70), 127, 128, 129, 192]:
        p, S, queries, length = place(), 1 + D % 7, 1 + D % 4, 17 + D % 40
        blocks = -(-length // S)
        k, v = (p(torch.randn(length, 2, D).to(dtype)) for _ in range(2))
        caches = [p(torch.zeros(blocks, 2, S, D, dtype=codes or dtype)) for _ in range(2)]
        scales = [p(torch.zeros(blocks, 2, S)) if codes else None for _ in range(2)]
        native.write_kv(k, v, *caches, p(torch.arange(length)), *scales, length, blocks, 2, S, D)
        tables, start = p(torch.arange(blocks, dtype=torch.int32)), p(torch.tensor([0, queries], dtype=torch.int32))
        out, lengths = p(torch.zeros(queries, 4, D, dtype=dtype)), p(torch.tensor([length], dtype=torch.int32))
        native.paged_attention(
            p(torch.randn(queries, 4, D).to(dtype)), *caches, tables, start, lengths, queries, length, 0.1, True, 0, 0.0, None, *scales,
            queries, 4, 1, blocks, blocks, 2, S, D, out,
        )  # fmt: skip
