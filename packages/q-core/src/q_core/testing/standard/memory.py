"""Memory: what is read, what is written, what is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from q_core.testing.agreement import copy_call, map_call, tensors_of
from q_core.testing.calls import Call, sample_calls
from q_core.testing.standard.applies import only_ops
from q_core.testing.target import Target


def test_inputs_are_left_alone(target: Target) -> None:
    """Arguments keep their bytes, and so does the memory around them; of mutated ones, the memory around.

    Mend: write into a new tensor, not into an argument or a view of it (``.contiguous()`` gives the argument itself where it is
    contiguous). Memory around a tensor changes when a kernel writes past its end, such as a whole vector at the last partial block.
    """

    def untouched(call: Call) -> None:
        used = copy_call(call)
        written = _written(target, used)
        before = {name: [_bytes_outside(t, id(t) in written) for t in tensors_of(value)] for name, value in used.items()}
        target.run(used)
        for name, value in used.items():
            for tensor, bytes_before in zip(tensors_of(value), before[name], strict=True):
                same = torch.equal(_bytes_outside(tensor, id(tensor) in written), bytes_before)
                assert same, f"{target.record.name}{call!r}: it wrote to {name}, or beside it"

    target.for_all(untouched)
    target.finish()


def _written(target: Target, call: Mapping[str, Any]) -> set[int]:
    """Which tensors of a call the op may write to, by identity: an argument that is only read may be one of them."""
    return {id(tensor) for name in target.record.mutates for tensor in tensors_of(call[name])}


def _bytes_outside(tensor: Tensor, mutated: bool) -> Tensor:
    """The bytes of a tensor's storage, without those of the tensor if it may be written to (then it is contiguous)."""
    everything = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    if not mutated:
        return everything.clone()
    start = tensor.storage_offset() * tensor.element_size()
    return torch.cat((everything[:start], everything[start + tensor.numel() * tensor.element_size() :]))


@only_ops(lambda record: not record.mutates)
def test_outputs_are_new(target: Target) -> None:
    """Outputs are contiguous, of the shapes and dtypes that tracing promises, and share memory with nothing, not with a later call's.

    Mend: return a new tensor each time. A buffer kept between calls, or ``x.view(…)`` of an input, is not one.
    """

    def are_new(call: Call) -> None:
        used = copy_call(call)
        outputs = tensors_of(list(target.run(used).values()))
        again = tensors_of(list(target.run(copy_call(call)).values()))
        promised = tensors_of(target.record.fake(**map_call(lambda tensor: tensor.to("meta"), call)))
        where = f"{target.record.name}{call!r}"
        assert len(outputs) == len(promised), f"{where}: {len(outputs)} outputs, expected {len(promised)}"
        for i, (output, fake) in enumerate(zip(outputs, promised, strict=True)):
            got = (output.dtype, list(output.shape), output.device.type)
            assert got == (fake.dtype, list(fake.shape), torch.device(target.capabilities.device).type), (
                f"{where}: output {i} is {got}"
            )
            assert output.is_contiguous(), f"{where}: output {i} has strides {output.stride()}, expected a contiguous one"
        owners = [_storage(tensor) for value in used.values() for tensor in tensors_of(value)]
        made = [_storage(tensor) for tensor in (*outputs, *again) if tensor.numel()]
        assert len(set(made)) == len(made) and not set(made) & set(owners), f"{where}: outputs share memory"

    target.for_all(are_new)
    target.finish()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@only_ops(lambda record: bool(record.mutates))
def test_mutated_arguments_get_a_new_version(target: Target) -> None:
    """What is mutated gets a new version, and nothing else; otherwise autograd would use a saved tensor that has changed.

    Mend: q-core bumps the versions; name your op's arguments as the hook does and write to none but those that it mutates.
    """

    def versions(call: Call) -> None:
        used = copy_call(call)
        written = _written(target, used)
        before = {name: [tensor._version for tensor in tensors_of(value)] for name, value in used.items()}
        target.run(used)
        for name, value in used.items():
            for tensor, version in zip(tensors_of(value), before[name], strict=True):
                assert (tensor._version > version) == (id(tensor) in written), f"{target.record.name}{call!r}: {name}"

    target.for_each(versions, sample_calls(target.record, torch.float32, target.capabilities.device))
    target.finish()
