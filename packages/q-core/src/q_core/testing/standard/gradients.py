"""Gradients: the formulas are q-core's, and are made of ops that a backend serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from q_core.record import OpRecord
from q_core.samples.make import Make
from q_core.specs import bounds
from q_core.testing.agreement import map_call, map_tensors, reference_function, same_bits, same_layout, tensors_of
from q_core.testing.calls import Call, as_autocast_casts, sample_calls
from q_core.testing.standard.applies import only_ops
from q_core.testing.standard.quiet import without_torchs_warnings
from q_core.testing.target import Target


def _loss(record: OpRecord, function: Callable[..., Any], call: Call, names: list[str]) -> Callable[..., Tensor]:
    """The op, as a function of some arguments, to a weighted sum of its differentiable outputs."""

    def loss(*values: Tensor) -> Tensor:
        changed = call | dict(zip(names, values, strict=True))
        outputs = tensors_of(function(*(changed[name] for name in record.arguments)))
        make = Make(seed=7)
        terms = [(o * make.normal(*o.shape).to(o)).sum() for o in outputs if o.is_floating_point()]
        return torch.stack(terms).sum()

    return loss


def _gradients(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [same_layout(tensor).requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(loss(*leaves), leaves))


def _inputs(record: OpRecord, call: Call) -> list[str]:
    """The arguments of a call that its op has gradients to."""
    return [name for name in record.gradient.inputs if call[name] is not None] if record.gradient else []


@only_ops(lambda record: record.gradient is not None)
def test_gradients(target: Target) -> None:
    """Gradients through the op are those of the reference in float64, and being recorded doesn't change a result.

    Mend: the formula is q-core's and calls other ops; a backend's part is their values (``dequantize_4bit`` in ``gemm_4bit``'s).
    """
    record = target.record

    def differentiates(call: Call) -> None:
        names = _inputs(record, call)
        got = _gradients(_loss(record, target.function, call, names), [call[name] for name in names])
        # Rounded activations have no slope; the formula's is declared to be that of the native product.
        smooth = Call(map_call(Tensor.cpu, call) | ({"activations": "native"} if "activations" in call else {}))
        wide = _gradients(_loss(record, reference_function(record), smooth, names), [smooth[name].double() for name in names])
        for name, gradient, expected in zip(names, got, wide, strict=True):
            assert gradient.dtype is torch.float32, f"{record.name}{call!r}: gradient of {name} is {gradient.dtype}"
            wrong = ~((gradient.cpu().double() - expected).abs() <= bounds.gradient(expected))
            assert not bool(wrong.any()), f"{record.name}{call!r}: gradient of {name} is off in {int(wrong.sum())} elements"
        recorded = target.run(call | {name: same_layout(call[name]).requires_grad_() for name in names})
        assert same_bits(recorded, target.run(call)), f"{record.name}{call!r}: being recorded changes its result"

    target.for_each(differentiates, sample_calls(record, torch.float32, target.capabilities.device))
    target.finish()


@only_ops(lambda record: record.gradient is not None)
def test_functional_gradients(target: Target) -> None:
    """``torch.func.grad`` gives what ``torch.autograd.grad`` does, to the bit.

    Mend: q-core's kernel at the Autograd key sees to it; this fails if the backend registers one of its own.
    """

    def equal(call: Call) -> None:
        names = _inputs(target.record, call)
        loss, inputs = _loss(target.record, target.function, call, names), [call[name] for name in names]
        got = torch.func.grad(loss, tuple(range(len(names))))(*inputs)
        assert same_bits(list(got), _gradients(loss, inputs)), f"{target.record.name}{call!r}: torch.func.grad differs"

    target.for_each(equal, sample_calls(target.record, torch.float32, target.capabilities.device)[:3])
    target.finish()


@only_ops(lambda record: bool(record.autocast) and record.gradient is not None)
def test_gradients_under_autocast(target: Target) -> None:
    """Under autocast gradients have the dtype of the caller's tensors, and are those of the op on cast arguments.

    Mend: as for ``test_gradients``.
    """
    record = target.record
    device_type = torch.device(target.capabilities.device).type
    for call in sample_calls(record, torch.float32, target.capabilities.device, most=6):
        cast = as_autocast_casts(record, call, torch.bfloat16)
        if target.serves(cast):
            names = _inputs(record, call)
            loss, inputs = _loss(record, target.function, call, names), [call[name] for name in names]
            expected = _gradients(_cast_before(_loss(record, target.function, cast, names), names, record), inputs)
            got = _gradients(_under_autocast(loss, device_type), inputs)
            assert same_bits(got, expected), f"{record.name}{call!r}: under autocast its gradients are not those of cast arguments"
    target.finish()


def _cast_before(loss: Callable[..., Tensor], names: list[str], record: OpRecord) -> Callable[..., Tensor]:
    cast = [name in record.autocast for name in names]
    return lambda *values: loss(*(v.bfloat16() if c else v for v, c in zip(values, cast, strict=True)))


def _under_autocast(loss: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    def wrapped(*values: Tensor) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16):
            return loss(*values)

    return wrapped


def test_forward_mode_raises(target: Target) -> None:
    """A tangent (``torch.func.jvp``, dual tensors) is an error that names the op: no op has a forward-mode derivative, none gives zeros.

    Mend: q-core's kernel at the Autograd key sees to it; this fails if the backend registers one of its own.
    """
    for call in target.first_served():
        floating = [name for name, value in call.items() if any(tensor.is_floating_point() for tensor in tensors_of(value))]
        assert floating, f"{target.record.name} takes no values"
        for name in floating:
            with forward_ad.dual_level(), without_torchs_warnings():
                dual = map_tensors(_with_tangent, call[name])
                with pytest.raises(RuntimeError, match=f"{target.record.name} has no forward-mode derivative"):
                    target.run(call | {name: dual})
    target.finish()


def _with_tangent(tensor: Tensor) -> Tensor:
    return forward_ad.make_dual(tensor.clone(), torch.ones_like(tensor)) if tensor.is_floating_point() else tensor
