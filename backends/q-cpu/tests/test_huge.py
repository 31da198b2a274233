"""Tensors of more than 2^31 elements: what their rows at either end and around element 2^31 give is what those rows give alone.

Arguments are mapped and hardly written to, and pages that were never written to cost nothing; so calls take their outputs' memory,
mostly. ``nox -s huge`` runs this.
"""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from q_core.formats.codebooks import dynamic_map
from q_cpu import attention, moe, norm, quantize
from q_cpu.runtime import native

pytestmark = [pytest.mark.huge, pytest.mark.usefixtures("isa")]

SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)
bf16, u8, i8, i32 = torch.bfloat16, torch.uint8, torch.int8, torch.int32
EDGE = 2**31
COLUMNS = 2**15
ROWS = EDGE // COLUMNS + 3
CHOSEN = [0, 1, ROWS - 5, ROWS - 4, ROWS - 3, ROWS - 1]  # the fifth begins at element 2^31


def mapped(*sizes: int, dtype: torch.dtype = bf16) -> Tensor:
    """Zeros that take memory where they are written to."""
    shape = torch.Size(sizes)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, shape.numel() * dtype.itemsize, flags=private), dtype=dtype).view(shape)


def matrix(rows: int, columns: int, dtype: torch.dtype = bf16) -> Tensor:
    """Numbers; of a huge matrix, in the chosen rows."""
    if rows != ROWS:
        return torch.randint(0, 127, (rows, columns)).to(dtype)
    out = mapped(rows, columns, dtype=dtype)
    for row in CHOSEN:
        out[row] = torch.randint(0, 127, (columns,)).to(dtype)
    return out


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(got.reshape(-1).view(u8), expected.reshape(-1).view(u8))


# --- blocks and rows --------------------------------------------------------------------------------------------------


def test_blockwise():
    A = matrix(ROWS, COLUMNS)
    codes, absmax = quantize.quantize_blockwise(A, SIGNED, 256)
    expected_codes, expected_absmax = quantize.quantize_blockwise(A[CHOSEN], SIGNED, 256)
    assert_same(codes[CHOSEN], expected_codes)
    assert_same(absmax.view(ROWS, -1)[CHOSEN].flatten(), expected_absmax)
    expected = quantize.dequantize_blockwise(expected_codes, expected_absmax, SIGNED, 256, bf16)
    assert_same(quantize.dequantize_blockwise(codes, absmax, SIGNED, 256, bf16)[CHOSEN], expected)


@pytest.mark.parametrize("quant_type", ["nf4", "mxfp4"])
def test_4bit(quant_type):
    A = matrix(ROWS, COLUMNS)
    packed, absmax = quantize.quantize_4bit(A, 32, quant_type)
    expected_packed, expected_absmax = quantize.quantize_4bit(A[CHOSEN], 32, quant_type)
    assert_same(packed.view(ROWS, -1)[CHOSEN].flatten(), expected_packed)
    assert_same(absmax.view(ROWS, -1)[CHOSEN].flatten(), expected_absmax)
    expected = quantize.dequantize_4bit(expected_packed, expected_absmax, 32, quant_type, (len(CHOSEN), COLUMNS), bf16)
    assert_same(quantize.dequantize_4bit(packed, absmax, 32, quant_type, (ROWS, COLUMNS), bf16)[CHOSEN], expected)


@pytest.mark.parametrize("threshold", [0.0, 125.5])
def test_int8_rowwise(threshold):
    A = matrix(ROWS, COLUMNS)
    q, absmax, outliers = quantize.quantize_int8_rowwise(A, threshold)
    expected = quantize.quantize_int8_rowwise(A[CHOSEN], threshold)
    for got, one in zip((q[CHOSEN], absmax[CHOSEN], outliers), expected, strict=True):
        assert_same(got, one)


# --- products ---------------------------------------------------------------------------------------------------------

BLOCKSIZE = 16
PRODUCTS = {"gemm": bf16, "gemm_4bit": bf16, "gemm_4bit_int8": bf16, "int8_gemm": i8, "gemm_int8_weight": bf16}
"""The dtype of each one's tokens."""


def weights_of(op: str, N: int, K: int) -> tuple[Tensor, ...]:
    """A weight as the op takes it, each tensor by rows."""
    if op == "gemm":
        return (matrix(N, K),)
    if op.startswith("gemm_4bit"):
        return matrix(N, K // 2, u8), torch.rand(N, K // BLOCKSIZE)
    return matrix(N, K, i8), torch.rand(N)


def multiply(op: str, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    (T, K), N, function = x.shape, len(weights[0]), getattr(native, op)
    out = torch.empty(T, N, dtype=bf16)
    if op.startswith("gemm_4bit"):
        function(x, *weights, BLOCKSIZE, "nf4", T, N, K, None, out)
    elif op == "int8_gemm":
        function(x, weights[0], torch.ones(T), weights[1], T, N, K, None, out)
    else:
        function(x, *weights, T, N, K, None, out)
    return out


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("op", PRODUCTS)
def test_products_of_huge_weights(op, T):
    x, weights = matrix(T, COLUMNS, PRODUCTS[op]), weights_of(op, ROWS, COLUMNS)
    assert_same(multiply(op, x, weights)[:, CHOSEN].contiguous(), multiply(op, x, tuple(w[CHOSEN] for w in weights)))


@pytest.mark.parametrize("op", PRODUCTS)
def test_products_of_huge_activations(op):
    x, weights = matrix(ROWS, COLUMNS, PRODUCTS[op]), weights_of(op, 3, COLUMNS)
    tokens = CHOSEN * 4  # many, as a few would be summed in another order
    assert_same(multiply(op, x, weights)[tokens], multiply(op, x[tokens], weights))


@pytest.mark.parametrize("op", PRODUCTS)
def test_huge_products(op):
    x, weights = matrix(ROWS, BLOCKSIZE, PRODUCTS[op]), weights_of(op, COLUMNS, BLOCKSIZE)
    tokens = CHOSEN * 4
    assert_same(multiply(op, x, weights)[tokens], multiply(op, x[tokens], weights))


# --- steps of optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_optimizer_steps(bits):
    param, grad, codes, absmax = matrix(ROWS, COLUMNS), matrix(ROWS, COLUMNS), matrix(ROWS, COLUMNS, u8), torch.rand(ROWS, 128)
    alone = [tensor[CHOSEN] for tensor in (param, grad, codes, absmax)]
    for p, g, c, a in ((param, grad, codes, absmax), alone):
        rest = (0.1, 0.9 if bits == 8 else 0.0, 0.99, 0.9, 1.0, 1e-8, 0.1, 0.0, False, 0.1, 2)
        if bits == 8:
            native.optimizer_step_8bit("lion", [p], [g], [c], [], [], [a], [], [], [], SIGNED, UNSIGNED, *rest, 256)
        else:
            native.optimizer_step_32bit("sgd", [p], [g], [], [], [], [], *rest)
    for whole, part in zip((param, codes, absmax), (alone[0], *alone[2:]), strict=True):
        assert_same(whole[CHOSEN], part)


# --- norms and the like -----------------------------------------------------------------------------------------------


def test_norms():
    x, weight = matrix(ROWS, COLUMNS), torch.rand(COLUMNS).to(bf16)
    assert_same(norm.rms_norm(x, weight, 1e-6)[CHOSEN], norm.rms_norm(x[CHOSEN], weight, 1e-6))
    residual = torch.rand(1, COLUMNS).to(bf16)
    got = norm.add_rms_norm(x, residual.expand(ROWS, COLUMNS), weight, 1e-6)
    expected = norm.add_rms_norm(x[CHOSEN], residual.expand(len(CHOSEN), COLUMNS), weight, 1e-6)
    for whole, part in zip(got, expected, strict=True):
        assert_same(whole[CHOSEN], part)


def test_silu_and_mul():
    x = matrix(ROWS, 2 * COLUMNS)
    assert_same(norm.silu_and_mul(x)[CHOSEN], norm.silu_and_mul(x[CHOSEN]))


def test_rotary_embedding():
    heads, positions = matrix(ROWS, COLUMNS).view(ROWS, -1, 128), torch.arange(ROWS) % 7
    cos, sin = torch.rand(7, 64), torch.rand(7, 64)
    got = norm.rotary_embedding(heads, heads[:, :1], positions, cos, sin, False)
    expected = norm.rotary_embedding(heads[CHOSEN], heads[CHOSEN, :1], positions[CHOSEN], cos, sin, False)
    for whole, part in zip(got, expected, strict=True):
        assert_same(whole[CHOSEN], part)


def test_rows_that_are_far_apart():
    stride = EDGE + 64
    x = mapped(2 * stride + 1024).as_strided((3, 1024), (stride, 1))
    x.copy_(torch.randn(3, 1024))
    weight = torch.rand(1024).to(bf16)
    assert_same(norm.rms_norm(x, weight, 1e-6), norm.rms_norm(x.contiguous(), weight, 1e-6))
    assert_same(norm.silu_and_mul(x), norm.silu_and_mul(x.contiguous()))
    heads, angles = x.unflatten(1, (8, 128)), torch.rand(3, 64)
    options = torch.arange(3), angles, angles, True
    for far, near in zip(*(norm.rotary_embedding(h, h, *options) for h in (heads, heads.contiguous())), strict=True):
        assert_same(far, near)


# --- attention --------------------------------------------------------------------------------------------------------

G, S, D = 4, 16, 256
BLOCKS = EDGE // (G * S * D) + 2
CHOSEN_BLOCKS = [BLOCKS - 1, 0, BLOCKS - 3, BLOCKS - 2]  # the last begins at element 2^31


@pytest.mark.parametrize("codes", [None, i8])
def test_attention(codes):
    caches = [mapped(BLOCKS, G, S, D, dtype=codes or bf16) for _ in range(2)]
    scales = [mapped(BLOCKS, G, S, dtype=torch.float32) if codes else None for _ in range(2)]
    length = len(CHOSEN_BLOCKS) * S
    k, v = torch.randn(2, length, G, D).to(bf16)
    slots = torch.cat([torch.arange(block * S, (block + 1) * S) for block in CHOSEN_BLOCKS])
    attention.write_kv(k, v, *caches, slots, *scales)
    few = [None if tensor is None else tensor[CHOSEN_BLOCKS] for tensor in (*caches, *scales)]
    alone = [None if tensor is None else torch.zeros_like(tensor) for tensor in few]
    attention.write_kv(k, v, *alone[:2], torch.arange(length), *alone[2:])
    for got, expected in zip(few, alone, strict=True):
        assert expected is None or torch.equal(got, expected)

    stride = EDGE + 8
    q = mapped(2 * stride + 8 * D).as_strided((3, 8, D), (stride, D, 1))
    q.copy_(torch.randn(q.shape))
    rest = torch.tensor([0, 3], dtype=i32), torch.tensor([length], dtype=i32), 3, length, 0.1, True, None, None, None
    got = attention.paged_attention(q, *caches, torch.tensor([CHOSEN_BLOCKS], dtype=i32), *rest, *scales)
    assert_same(got, attention.paged_attention(q.contiguous(), *few[:2], torch.arange(4, dtype=i32)[None], *rest, *few[2:]))


def test_copy_kv_blocks():
    cache = mapped(BLOCKS, G, S, D, dtype=i8)
    for block in CHOSEN_BLOCKS:
        cache[block] = torch.randint(-128, 128, (G, S, D))
    before = cache[CHOSEN_BLOCKS]
    attention.copy_kv_blocks(cache, cache, torch.tensor(list(pairwise(CHOSEN_BLOCKS))))
    assert_same(cache[CHOSEN_BLOCKS], before[[0, 0, 1, 2]])


# --- experts ----------------------------------------------------------------------------------------------------------


def test_route_topk():
    logits = matrix(ROWS, COLUMNS).view(-1, 1024)
    rows = torch.arange(len(logits)).view(ROWS, -1)[CHOSEN].flatten()
    for whole, part in zip(*(moe.route_topk(x, 4, True, "softmax") for x in (logits, logits[rows])), strict=True):
        assert_same(whole[rows], part)


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_huge_experts(format):
    K, N, E = 2048, 1024, 514
    chosen = [0, 511, 512, 513]  # the third begins at element 2^31
    sizes = [(E, 2 * N, K), (E, K, N)]
    scales: list[Tensor | None] = [None, None]
    if format == "nf4":
        sizes = [(E, rows * columns // 2) for _, rows, columns in sizes]
        scales = [torch.rand(E, 2 * size // 64) for _, size in sizes]
    weights = [mapped(*size, dtype=u8 if format == "nf4" else bf16) for size in sizes]
    for weight in weights:
        for expert in chosen:
            weight[expert] = torch.randint(0, 3, weight.shape[1:])
    x, ids, shares = torch.randn(4, K).to(bf16), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=i32), torch.rand(4, 2)
    few = [None if tensor is None else tensor[chosen] for tensor in (*weights, *scales)]
    expected = moe.fused_moe(x, *few[:2], shares, ids, format, N, *few[2:], 64)
    got = moe.fused_moe(x, *weights, shares, torch.tensor(chosen, dtype=i32)[ids.long()], format, N, *scales, 64)
    assert_same(got, expected)


def test_experts_of_huge_activations():
    x, w13, w2 = matrix(ROWS, COLUMNS), torch.randn(1, 2, COLUMNS).to(bf16), torch.randn(1, COLUMNS, 1).to(bf16)
    tokens = CHOSEN * 4
    ids, shares = torch.zeros(ROWS, 1, dtype=i32), torch.rand(ROWS, 1)
    got = moe.fused_moe(x, w13, w2, shares, ids, "dense", 1, None, None, 64)[tokens]
    assert_same(got, moe.fused_moe(x[tokens], w13, w2, shares[tokens], ids[tokens], "dense", 1, None, None, 64))
