"""Every op composes with torch: opcheck, torch.compile, export, autocast, version counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from q_core import bound, ops
from q_core.samples.make import Make
from q_core.specs import RECORDS, record_of
from q_core.testing.agreement import fresh


def calls(op: str, dtype: torch.dtype, most: int = 100) -> list[tuple[Any, ...]]:
    record = record_of(op)
    return [tuple(call[name] for name in record.arguments) for call in record.samples(Make(), dtype)][:most]


@pytest.mark.parametrize("op", RECORDS)
def test_opcheck(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for arguments in calls(op, dtype, most=4):
            torch.library.opcheck(getattr(torch.ops.q, op).default, arguments)


@pytest.mark.parametrize("op", RECORDS)
def test_compile_fullgraph(op: str) -> None:
    function = bound(op)
    compiled = torch.compile(lambda *a: function(*a), fullgraph=True, backend="aot_eager", dynamic=False)
    for arguments in calls(op, torch.float32, most=3):
        eager_arguments, compiled_arguments = fresh(list(arguments)), fresh(list(arguments))
        expected, got = function(*eager_arguments), compiled(*compiled_arguments)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        for before, after in zip(eager_arguments, compiled_arguments, strict=True):
            if isinstance(before, Tensor) or (isinstance(before, list) and before and isinstance(before[0], Tensor)):
                torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    torch.compiler.reset()


def test_public_functions_compile_with_dynamic_tokens_and_backward() -> None:
    packed, absmax = ops.quantize_4bit(torch.randn(24, 40))

    def step(x: Tensor, weight: Tensor) -> Tensor:
        y = ops.gemm_4bit(x, packed, absmax, shape=(24, 40))
        return ops.silu_and_mul(ops.rms_norm(y, weight))

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (3, 5, 17):
        x = torch.randn(tokens, 40, requires_grad=True)
        weight = torch.randn(24, requires_grad=True)
        step(x, weight).square().sum().backward()
        expected = [x.grad, weight.grad]
        x.grad = weight.grad = None
        compiled(x, weight).square().sum().backward()
        torch.testing.assert_close([x.grad, weight.grad], expected)
    torch.compiler.reset()


def test_export() -> None:
    packed, absmax = ops.quantize_4bit(torch.randn(8, 64))

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.gemm_4bit(x, packed, absmax, shape=(8, 64))

    x = torch.randn(4, 64)
    program = torch.export.export(Layer(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("T")}})
    more = torch.randn(9, 64)
    torch.testing.assert_close(program.module()(more), Layer()(more), rtol=0, atol=0)


@pytest.mark.parametrize("op", [op for op, record in RECORDS.items() if record.mutates])
def test_what_is_mutated_gets_a_new_version(op: str) -> None:
    """Otherwise autograd would use a mutated tensor that it had saved, and give wrong gradients without a word."""
    record = record_of(op)
    arguments = fresh(list(calls(op, torch.float32)[0]))
    bound(op)(*arguments)
    for name, value in zip(record.arguments, arguments, strict=True):
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor):
                assert (tensor._version > 0) == (name in record.mutates), name


def test_a_saved_tensor_that_is_mutated_raises_in_backward() -> None:
    cache = torch.zeros(2, 1, 4, 8)
    x = torch.ones(2, 1, 4, 8, requires_grad=True)
    product = x * cache
    with torch.no_grad():
        ops.write_kv(torch.ones(1, 1, 8), torch.ones(1, 1, 8), cache, torch.zeros_like(cache), torch.tensor([3]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("op", [op for op, record in RECORDS.items() if record.mutates])
def test_ops_that_mutate_work_on_inference_tensors(op: str) -> None:
    with torch.inference_mode():
        for arguments in calls(op, torch.float32):
            bound(op)(*fresh(list(arguments)))


def test_autocast_casts_activations_and_bias_and_no_scales() -> None:
    x, weight, bias = torch.randn(4, 64), torch.randn(8, 64), torch.randn(8)
    packed, absmax = ops.quantize_4bit(weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.gemm_4bit(x, packed, absmax, shape=(8, 64), bias=bias)
        dense = ops.gemm(x, weight, bias=bias)
        decoded = ops.dequantize_4bit(packed, absmax, shape=(8, 64), dtype=torch.float32)
    assert y.dtype is dense.dtype is torch.bfloat16
    assert decoded.dtype is torch.float32
    expected = ops.gemm_4bit(x.bfloat16(), packed, absmax, shape=(8, 64), bias=bias.bfloat16())
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_autocast_keeps_the_gradient_in_the_callers_dtype() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    packed, absmax = ops.quantize_4bit(torch.randn(8, 64))
    with torch.autocast("cpu", torch.bfloat16):
        ops.gemm_4bit(x, packed, absmax, shape=(8, 64)).float().sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.float32


def test_autocast_changes_nothing_inside_of_an_op() -> None:
    """The reference's own products would be in 16 bits."""
    q, cache = torch.randn(3, 2, 8), torch.randn(1, 2, 4, 8)
    table, start, length = (torch.tensor(values, dtype=torch.int32) for values in ([[0]], [0, 3], [4]))

    def attend() -> Tensor:
        return ops.paged_attention(q, cache, cache, table, start, length, max_query_len=3, max_seq_len=4)

    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attend()
    assert torch.equal(under_autocast, attend())


def test_transforms_of_the_public_functions() -> None:
    packed, absmax = ops.quantize_4bit(torch.randn(8, 64))
    x = torch.randn(3, 4, 64)

    def product(x: Tensor) -> Tensor:
        return ops.gemm_4bit(x, packed, absmax, shape=(8, 64))

    torch.testing.assert_close(torch.vmap(product)(x), product(x))
    decoded = ops.dequantize_4bit(packed, absmax, shape=(8, 64))
    torch.testing.assert_close(torch.func.grad(lambda x: product(x).sum())(x), decoded.sum(0).expand_as(x))
    torch.testing.assert_close(torch.vmap(torch.func.grad(lambda x: product(x).square().sum()))(x), 2 * product(x) @ decoded)
    with pytest.raises(RuntimeError, match="gemm_4bit has no forward-mode derivative"):
        torch.func.jvp(product, (x,), (torch.ones_like(x),))
