"""Composition: what torch does with any operator works with these too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from q_core.record import OpRecord
from q_core.testing.agreement import copy_call, map_tensors, same_bits, tensors_of
from q_core.testing.calls import Call, activation, as_autocast_casts, sample_calls
from q_core.testing.standard.applies import only_ops
from q_core.testing.standard.quiet import without_torchs_warnings
from q_core.testing.target import Target


def test_opcheck(target: Target) -> None:
    """``torch.library.opcheck``: schema, fake kernel and autograd registration hold for the real implementation.

    Mend: its message names the check; a schema fault is a mutated or returned argument, a fake one another shape, dtype or stride.
    """
    inputs = target.record.gradient.inputs if target.record.gradient else ()
    for call in target.first_served():
        used = copy_call(call)
        for tensor in tensors_of([used[name] for name in inputs]):
            tensor.requires_grad_()
        torch.library.opcheck(getattr(torch.ops.q, target.record.name).default, tuple(used[n] for n in target.record.arguments))
    target.finish()


class _Layer(torch.nn.Module):
    """The op on tensors that are given, with settings that are fixed."""

    def __init__(self, target: Target, call: Call) -> None:
        super().__init__()
        self._arguments, self._function, self._call = target.record.arguments, target.function, call

    def forward(self, tensors: dict[str, Any]) -> Any:
        return self._function(*(tensors.get(name, self._call[name]) for name in self._arguments))


def test_export(target: Target) -> None:
    """An exported program holds the op as one node, and gives and mutates what the op does, to the bit.

    Mend: the fake kernel is q-core's; results differ if the implementation looks at more than its arguments.
    """
    for call in target.first_served():
        inputs, expected, got = ({n: v for n, v in copy_call(call).items() if tensors_of(v)} for _ in range(3))
        with without_torchs_warnings():
            program = torch.export.export(_Layer(target, call), (inputs,), strict=False)
        called = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert target.function in called or target.record.mutates, f"{target.record.name}{call!r}: exported as {called}"
        results = _Layer(target, call)(expected), program.module()(got)
        assert same_bits(*results), f"{target.record.name}{call!r}: exported, it gives another result"
        assert same_bits(expected, got), f"{target.record.name}{call!r}: exported, it leaves other arguments"
    target.finish()


def test_autocast(target: Target) -> None:
    """Under autocast the arguments that the record names are cast, no others, and nothing inside the op: scales stay float32.

    Mend: q-core casts; a backend in plain torch fails if it computes by operators that autocast changes again.
    """
    device_type = torch.device(target.capabilities.device).type
    for call in sample_calls(target.record, torch.float32, target.capabilities.device, most=6):
        cast = as_autocast_casts(target.record, call, torch.bfloat16)
        if target.serves(cast):
            expected = target.run(copy_call(cast))
            with torch.autocast(device_type, torch.bfloat16):
                got = target.run(copy_call(call))
            assert same_bits(got, expected), f"{target.record.name}{call!r}: under autocast it is not that of cast arguments"
    target.finish()


@only_ops(lambda record: not record.mutates and not _takes_lists(record))
def test_vmap(target: Target) -> None:
    """``torch.vmap`` over the activations is the op on each slice, to the bit.

    Mend: torch loops over the op; a result differs if the implementation looks at more than its arguments, as their storage.
    """
    for call in target.first_served():
        name = activation(target.record, call)
        assert name is not None, f"{target.record.name} takes no values"
        slices = [call[name], call[name] / 2]
        got = _mapped(target, call, name, torch.stack(slices))
        for i, value in enumerate(slices):
            mine = [output[i] for output in tensors_of(got)]
            expected = target.run(Call(call | {name: value}))
            assert same_bits(mine, expected), f"{target.record.name}{call!r}: slice {i} of vmap over {name} differs"
    target.finish()


def _takes_lists(record: OpRecord) -> bool:
    return any(str(argument.type) == "List[Tensor]" for argument in getattr(torch.ops.q, record.name).default._schema.arguments)


def _mapped(target: Target, call: Call, name: str, batch: Any) -> Any:
    with without_torchs_warnings():
        return torch.vmap(lambda value: target.function(*(Call(call | {name: value})[n] for n in target.record.arguments)))(batch)


@only_ops(lambda record: bool(record.mutates))
def test_vmap_of_what_is_mutated_raises(target: Target) -> None:
    """``torch.vmap`` over an argument that the op writes to is an error that names the op, and writes nothing.

    Mend: q-core's kernels see to it; this fails if the backend registers a batching rule of its own.
    """
    for call in target.first_served():
        for name in (name for name in target.record.mutates if tensors_of(call[name])):
            batch = map_tensors(lambda tensor: torch.stack((tensor, tensor)), call[name])
            before = [tensor.clone() for tensor in tensors_of(batch)]
            with pytest.raises(RuntimeError, match=target.record.name):
                _mapped(target, call, name, batch)
            assert same_bits(tensors_of(batch), before), f"{target.record.name}{call!r}: vmap over {name} wrote to it"
    target.finish()
