"""Tensors of more than 2^31 elements: what their rows at either end and around element 2^31 give is what those rows give alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from q_core import ops

pytestmark = pytest.mark.gpu

bf16, u8, f32 = torch.bfloat16, torch.uint8, torch.float32


@dataclass(frozen=True, slots=True)
class Large:
    """The sizes of a matrix of more elements than ``edge``, and makes such.

    Attributes:
        rows, columns: its sizes.
        chosen: rows at its ends and around element ``edge``.
        device: where it is.
    """

    rows: int
    columns: int
    chosen: list[int]
    device: torch.device

    def matrix(self, columns: int = 0, dtype: torch.dtype = bf16) -> Tensor:
        """Numbers in the chosen rows, zeros elsewhere."""
        columns = columns or self.columns
        out = torch.zeros(self.rows, columns, dtype=dtype, device=self.device)
        for row in self.chosen:
            out[row] = torch.randint(0, 127, (columns,), device=self.device).to(dtype)
        return out

    def vector(self, size: int) -> Tensor:
        return torch.rand(size, device=self.device)


@pytest.fixture
def large(device: torch.device, interpreted: bool) -> Large:
    edge, columns = (2**12, 2**8) if interpreted else (2**31, 2**15)
    rows = edge // columns + 3
    return Large(rows, columns, [0, 1, rows - 5, rows - 4, rows - 3, rows - 1], device)


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(got.reshape(-1).view(u8), expected.reshape(-1).view(u8))


def test_blockwise(large: Large) -> None:
    A = large.matrix()
    codes, absmax = ops.quantize_blockwise(A)
    expected_codes, expected_absmax = ops.quantize_blockwise(A[large.chosen])
    assert_same(codes[large.chosen], expected_codes)
    assert_same(absmax.view(large.rows, -1)[large.chosen].flatten(), expected_absmax)
    expected = ops.dequantize_blockwise(expected_codes, expected_absmax, dtype=bf16)
    assert_same(ops.dequantize_blockwise(codes, absmax, dtype=bf16)[large.chosen], expected)


@pytest.mark.parametrize("quant_type", ["nf4", "mxfp4"])
def test_4bit(quant_type, large: Large) -> None:
    A = large.matrix()
    packed, absmax = ops.quantize_4bit(A, blocksize=32, quant_type=quant_type)
    expected_packed, expected_absmax = ops.quantize_4bit(A[large.chosen], blocksize=32, quant_type=quant_type)
    assert_same(packed.view(large.rows, -1)[large.chosen].flatten(), expected_packed)
    assert_same(absmax.view(large.rows, -1)[large.chosen].flatten(), expected_absmax)
    kind = {"blocksize": 32, "quant_type": quant_type, "dtype": bf16}
    expected = ops.dequantize_4bit(expected_packed, expected_absmax, shape=(len(large.chosen), large.columns), **kind)
    assert_same(ops.dequantize_4bit(packed, absmax, shape=A.shape, **kind)[large.chosen], expected)


@pytest.mark.parametrize("threshold", [0.0, 125.5])
def test_int8_rowwise(threshold, large: Large) -> None:
    A = large.matrix()
    q, absmax, outliers = ops.quantize_int8_rowwise(A, threshold=threshold)
    expected = ops.quantize_int8_rowwise(A[large.chosen], threshold=threshold)
    for got, one in zip((q[large.chosen], absmax[large.chosen], outliers), expected, strict=True):
        assert_same(got, one)


@pytest.mark.parametrize("tokens", [1, 9])
def test_products_of_large_weights(tokens, large: Large) -> None:
    """In two orders of summation at most: a column's is that of its weight's row, whichever the others are."""
    x = torch.randint(0, 127, (tokens, large.columns), device=large.device).to(bf16)
    packed, absmax = large.matrix(large.columns // 2, u8), large.vector(large.rows * large.columns // 64)
    got = ops.gemm_4bit(x, packed, absmax, shape=(large.rows, large.columns))
    some = packed[large.chosen], absmax.view(large.rows, -1)[large.chosen].flatten()
    weight = ops.dequantize_4bit(*some, shape=(len(large.chosen), large.columns))
    expected = x.double() @ weight.double().T
    assert ((got[:, large.chosen].double() - expected).norm() <= torch.finfo(bf16).eps * expected.norm()).item()


@pytest.mark.parametrize("bits", [8, 32])
def test_optimizer_steps(bits, large: Large) -> None:
    param, grad = large.matrix(), large.matrix()
    if bits == 8:
        state = {"state1": [large.matrix(dtype=u8)], "absmax1": [large.vector(large.rows * large.columns // 256)]}
        step, settings = ops.optimizer_step_8bit, {"lr": 0.1, "beta1": 0.9, "beta2": 0.99}
    else:
        state, step, settings = {}, ops.optimizer_step_32bit, {"lr": 0.1}
    alone = {key: [held.view(large.rows, -1)[large.chosen].clone()] for key, (held,) in state.items()}
    for key in alone.keys() & {"absmax1"}:
        alone[key] = [alone[key][0].flatten()]
    params, grads = param[large.chosen], grad[large.chosen]
    name = "lion" if bits == 8 else "sgd"
    step(name, [param], [grad], **state, **settings, step=2)
    step(name, [params], [grads], **alone, **settings, step=2)
    assert_same(param[large.chosen], params)
    for key, (held,) in state.items():
        assert_same(held.view(large.rows, -1)[large.chosen].flatten(), alone[key][0].flatten())


def test_norms_and_gate(large: Large) -> None:
    x, weight = large.matrix(), large.vector(large.columns).to(bf16)
    assert_same(ops.rms_norm(x, weight)[large.chosen], ops.rms_norm(x[large.chosen], weight))
    gated = ops.silu_and_mul(x)
    assert_same(gated[large.chosen], ops.silu_and_mul(x[large.chosen]))
    del gated
    normed, total = ops.add_rms_norm(x, x, weight)
    expected = ops.add_rms_norm(x[large.chosen], x[large.chosen], weight)
    for got, one in zip((normed, total), expected, strict=True):
        assert_same(got[large.chosen], one)


def test_rotary_embedding(large: Large) -> None:
    D = 128
    x = large.matrix().view(large.rows, large.columns // D, D)
    angles = torch.rand(32, D // 2, device=large.device)
    positions = torch.arange(large.rows, device=large.device) % 32
    q, _ = ops.rotary_embedding(x, x[:, :1], positions, angles.cos(), angles.sin())
    some = x[large.chosen]
    expected, _ = ops.rotary_embedding(some, some[:, :1], positions[large.chosen], angles.cos(), angles.sin())
    assert_same(q[large.chosen], expected)


@pytest.mark.parametrize("codes", [bf16, torch.int8])
def test_caches(codes, large: Large) -> None:
    """Written to, attended to and copied beyond element 2^31, as a small cache is."""
    G, S, D = 2, 16, 64
    blocks = large.rows * large.columns // (G * S * D) + 1
    last = [blocks - 1, 0, blocks - 2]
    tokens = len(last) * S
    new = [torch.randn(tokens, G, D, device=large.device).to(bf16) for _ in "kv"]
    scaled = codes is not bf16

    def cache(count: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        held = [torch.zeros(count, G, S, D, dtype=codes, device=large.device) for _ in "kv"]
        scales = {f"{name}_scale_BGS": torch.zeros(count, G, S, device=large.device) for name in "kv"} if scaled else {}
        return held, scales

    def fill(held: list[Tensor], scales: dict[str, Tensor], table: list[int]) -> Tensor:
        slots = torch.tensor([block * S + slot for block in table for slot in range(S)], device=large.device)
        ops.write_kv(*new, *held, slots, **scales)
        q = torch.ones(1, 2 * G, D, dtype=bf16, device=large.device)
        tables, starts, lengths = (
            torch.tensor(values, dtype=torch.int32, device=large.device) for values in ([table], [0, 1], [tokens])
        )
        return ops.paged_attention(q, *held, tables, starts, lengths, max_query_len=1, max_seq_len=tokens, **scales)

    held, scales = cache(blocks)
    small, small_scales = cache(3)
    assert_same(fill(held, scales, last), fill(small, small_scales, [0, 1, 2]))
    ops.copy_kv_blocks(held[0], held[0], torch.tensor([[blocks - 1, blocks // 2]], device=large.device))
    assert_same(held[0][blocks // 2], small[0][0])
