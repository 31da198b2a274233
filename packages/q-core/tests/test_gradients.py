"""Gradient formulas against autograd through a plain composition, and what has no gradient raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from q_core import bound, ops
from q_core.formats.codebooks import dynamic_map
from q_core.samples.make import Make
from q_core.specs import RECORDS, record_of
from q_core.testing.agreement import reference_function, same_layout

WITH_FORMULA = [op for op, record in RECORDS.items() if record.gradient]


def inputs(op: str, call: dict[str, Any]) -> list[str]:
    gradient = record_of(op).gradient
    assert gradient is not None
    return [name for name in gradient.inputs if call[name] is not None]


@pytest.mark.parametrize("op", WITH_FORMULA)
def test_formula_equals_autograd_through_the_reference(op: str) -> None:
    """The reference in float64 is plain torch, which autograd differentiates itself."""
    record = record_of(op)
    for call in record.samples(Make(), torch.float32):
        if call.get("activations") == "int8":  # whose gradient is declared to be the native product's
            continue
        names = inputs(op, call)

        def gradients(function: Any, dtype: torch.dtype, call: dict[str, Any] = call, names: list[str] = names) -> list[Tensor]:
            leaves = {name: call[name].to(dtype).clone().requires_grad_() for name in names}
            result = function(*(leaves.get(name, call[name]) for name in record.arguments))
            outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
            make = Make(seed=7)
            loss = sum((o * make.normal(*o.shape, dtype=dtype)).sum() for o in outputs)
            return list(torch.autograd.grad(loss, list(leaves.values())))

        got = gradients(bound(op), torch.float32)
        expected = gradients(reference_function(record), torch.float64)
        for name, a, b in zip(names, got, expected, strict=True):
            assert a.dtype is torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{op} {n}: {m}")


@pytest.mark.parametrize("op", WITH_FORMULA)
def test_each_input_has_a_gradient_of_its_own(op: str) -> None:
    """Frozen inputs beside it change nothing, as in LoRA, where only the activations want one."""
    record = record_of(op)
    for call in record.samples(Make(), torch.float32):

        def gradients(*names: str, call: dict[str, Any] = call) -> list[Tensor]:
            leaves = {name: same_layout(call[name]).requires_grad_() for name in names}
            result = bound(op)(*(leaves.get(name, call[name]) for name in record.arguments))
            outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
            return list(torch.autograd.grad([o.square().sum() for o in outputs], list(leaves.values())))

        together = gradients(*inputs(op, call))
        alone = [gradients(name)[0] for name in inputs(op, call)]
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


REFUSED = {("fused_moe", "w13"), ("fused_moe", "w2")}
"""Weights, which someone might mean to train."""


@pytest.mark.parametrize("op", WITH_FORMULA)
def test_what_is_no_input_of_the_formula_gets_no_gradient(op: str) -> None:
    """Scales, tables and frozen experts: refused, or ``None``, never zeros or something made up."""
    record = record_of(op)
    for call in record.samples(Make(), torch.float32):
        others = [n for n, v in call.items() if isinstance(v, Tensor) and v.is_floating_point() and n not in inputs(op, call)]
        for name in others:
            leaf = call[name].clone().requires_grad_()
            if (op, name) in REFUSED:
                with pytest.raises(RuntimeError, match=f"{op} has no gradient to its"):
                    bound(op)(*((call | {name: leaf})[argument] for argument in record.arguments))
                continue
            result = bound(op)(*((call | {name: leaf})[argument] for argument in record.arguments))
            loss = sum(o.sum() for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad)
            assert torch.autograd.grad(loss, leaf, allow_unused=True) == (None,)


LISTS = ("prepack_weight", "unpack_weight")


@pytest.mark.parametrize("op", LISTS)
def test_an_op_on_lists_refuses_to_be_recorded(op: str) -> None:
    call = next(record_of(op).samples(Make(), torch.float32))
    call["tensors"][0].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op} has no gradient: run it under torch.no_grad"):
        bound(op)(*(call[name] for name in record_of(op).arguments))
    assert not getattr(ops, op)(**call)[0].requires_grad


@pytest.mark.parametrize("op", [op for op, r in RECORDS.items() if not r.gradient and not r.mutates and op not in LISTS])
def test_without_a_formula_the_backward_raises(op: str) -> None:
    record = record_of(op)
    call = next(record.samples(Make(), torch.float32))
    leaves = {n: v.clone().requires_grad_() for n, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()}
    result = bound(op)(*(leaves.get(name, call[name]) for name in record.arguments))
    outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad]
    assert outputs, "a lost gradient would go unnoticed"
    with pytest.raises(RuntimeError, match=f"{op} has no gradient"):
        sum(o.sum() for o in outputs).backward()


@pytest.mark.parametrize("op", [op for op, record in RECORDS.items() if record.mutates])
def test_an_op_that_mutates_refuses_to_be_recorded(op: str) -> None:
    record = record_of(op)
    call = next(record.samples(Make(), torch.float32))
    name = next(name for name in ("k_TGD", "params", "src") if name in call)
    value = call[name]
    call[name] = [v.requires_grad_() for v in value] if isinstance(value, list) else value.requires_grad_()
    arguments = [call[n] for n in record.arguments]
    with pytest.raises(RuntimeError, match=rf"{op} writes to its arguments and has no gradient: run it under torch.no_grad"):
        bound(op)(*arguments)
    with torch.no_grad():
        bound(op)(*arguments)


@pytest.mark.parametrize("bits", [8, 32])
def test_public_optimizer_steps_take_parameters_in_grad_mode(bits: int) -> None:
    parameter, gradient = torch.nn.Parameter(torch.ones(300)), torch.ones(300)
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    if bits == 32:
        ops.optimizer_step_32bit("adamw", [parameter], [gradient], [torch.zeros(300)], [torch.zeros(300)], **settings)
    else:
        states = [ops.quantize_blockwise(torch.zeros(300), dynamic_map(signed=signed)) for signed in (True, False)]
        codes, scales = ([[state[i]] for state in states] for i in range(2))
        ops.optimizer_step_8bit("adamw", [parameter], [gradient], *codes, absmax1=scales[0], absmax2=scales[1], **settings)
    torch.testing.assert_close(parameter.detach(), torch.full((300,), 0.9))
    assert parameter.requires_grad and parameter.grad_fn is None and parameter._version == 1


def test_frozen_inputs_get_no_gradient_and_cost_no_memory() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    y = ops.rms_norm(x, weight)
    y.sum().backward()
    assert x.grad is not None and weight.grad is None


def test_double_backward_of_gemm() -> None:
    # Integers this small keep every sum below 2^24, so no order of adding may differ.
    x, w = (torch.randint(-1, 2, (4, 6)).float().requires_grad_() for _ in range(2))

    def second(product: Any) -> Tensor:
        (dx,) = torch.autograd.grad(product(x, w).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), w)[0]

    expected = second(F.linear)
    assert expected.any()
    torch.testing.assert_close(second(ops.gemm), expected, rtol=0, atol=0)
