"""Agreement of an implementation with the reference: exact where the contract is, within the record's bound elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q_core.record import Arguments, OpRecord
from q_core.samples.make import Make
from q_core.specs import record_of
from q_core.specs.check import FLOATS

Outputs = dict[str, Any]
"""Results by name, or the arguments that were mutated."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One output of one call that is not what the reference says."""

    op: str
    call: str
    output: str
    message: str

    def __str__(self) -> str:
        return f"{self.op}({self.call}): {self.output} {self.message}"


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to an argument that is a tensor or a list of them; another argument stays."""
    if isinstance(value, Tensor):
        return function(value)
    return [map_tensors(function, v) for v in value] if isinstance(value, list) else value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in an argument, a result, or a call."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def same_layout(tensor: Tensor) -> Tensor:
    """A copy with its own storage and the same strides and offset: ``clone`` would undo what makes a layout odd."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.detach().as_strided((elements,), (1,), 0).clone()
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def fresh(value: Any) -> Any:
    """The same argument on tensors of its own, in the same layouts."""
    return map_tensors(same_layout, value)


def map_call(function: Callable[[Tensor], Tensor], call: Mapping[str, Any]) -> Arguments:
    """Apply a function to the tensors of a call; where two arguments are one tensor, they stay one."""
    done: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = function(tensor)
        return done[id(tensor)]

    return {name: map_tensors(once, value) for name, value in call.items()}


def copy_call(call: Mapping[str, Any]) -> Arguments:
    """The same call on tensors of its own, in the same layouts."""
    return map_call(same_layout, call)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arguments or results hold the same bits in the same dtypes and shapes; NaN is like any other."""
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return all(x.dtype is y.dtype and x.shape == y.shape and torch.equal(_bytes(x), _bytes(y)) for x, y in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).view(-1)  # an empty one may be contiguous at any stride
    return flat.view(torch.uint8)


def _double(tensor: Tensor) -> Tensor:
    """Float64 of what is computed with; codes stay, those of an 8-bit float too."""
    return tensor.double() if tensor.dtype in FLOATS else tensor


def run(record: OpRecord, function: Callable[..., Any], call: Arguments) -> Outputs:
    """Outputs by name: the results, or the arguments that were mutated."""
    result = function(*(call[name] for name in record.arguments))
    if record.mutates:
        return {name: call[name] for name in record.mutates if call[name] is not None}
    results = result if isinstance(result, tuple) else (result,)
    return {f"output {i}": value for i, value in enumerate(results)}


def reference_function(record: OpRecord) -> Callable[..., Any]:
    return record.reference


def expected_outputs(record: OpRecord, call: Arguments) -> tuple[Outputs, Outputs]:
    """What the reference gives, and how far from it a result may be (``None``: not at all)."""
    clone = copy_call(call)
    if record.bound is None:
        exact = run(record, reference_function(record), clone)
        return exact, dict.fromkeys(exact)
    # The reference computes in float64 for float64 inputs; scales, code books and states that enter it are exact in both.
    wide = map_call(_double, clone)
    expected = run(record, reference_function(record), wide)
    outputs = tuple(expected.values())
    if record.mutates:
        bounds: Mapping[str, Any] = record.bound(call, {name: _like(call[name], expected[name]) for name in expected})
        return expected, dict(bounds)
    bound = record.bound(call, outputs if len(outputs) > 1 else outputs[0])
    return expected, dict(zip(expected, bound if isinstance(bound, tuple) else (bound,), strict=True))


def _like(originals: Any, values: Any) -> Any:
    """Values in the dtype of the originals, by which a bound is chosen."""
    if isinstance(values, list):
        return [_like(o, v) for o, v in zip(originals, values, strict=True)]
    return values.to(originals.dtype)


def compare(got: Any, expected: Any, bound: Any) -> str | None:
    """What is wrong with an output, or ``None``.

    Where the expected value is finite, the error is at most the bound (where that is finite, else the result is finite too); where it is
    not, neither is the result. A value beyond the output's dtype may be infinite. An exact result is equal, NaN to NaN.
    """
    if isinstance(got, list):
        for i, item in enumerate(got):
            message = compare(item, expected[i], None if bound is None else bound[i])
            if message:
                return f"[{i}] {message}"
        return None
    if got.shape != expected.shape:
        return f"has shape {list(got.shape)}, expected {list(expected.shape)}"
    if bound is None:
        if got.dtype is not expected.dtype:
            return f"has dtype {got.dtype}, expected {expected.dtype}"
        if got.dtype.itemsize == 1 and got.dtype.is_floating_point:
            got, expected = got.view(torch.uint8), expected.view(torch.uint8)
        same = (got == expected) | (got.isnan() & expected.isnan())
        return None if bool(same.all()) else f"differs in {int((~same).sum())} of {same.numel()} elements, expected equality"
    finite = expected.isfinite()
    swallowed = ~finite & got.isfinite()
    if bool(swallowed.any()):
        return f"is finite in {int(swallowed.sum())} of {swallowed.numel()} elements that are not finite"
    error = (got.double() - expected.double()).abs()
    overflowed = ~expected.to(got.dtype).isfinite() & ~got.isfinite()
    wrong = finite & ~((error <= bound) | (~torch.as_tensor(bound).isfinite() & got.isfinite()) | overflowed)
    if not bool(wrong.any()):
        return None
    return f"misses in {int(wrong.sum())} of {wrong.numel()} elements, at most by {float(error[wrong].max()):.3g}"


def describe(call: Mapping[str, Any]) -> str:
    """A call in a line: dtypes, shapes and odd strides of its tensors, and its settings."""

    def short(value: Any) -> str:
        if isinstance(value, Tensor):
            layout = "" if value.is_contiguous() else f" strides {list(value.stride())}"
            offset = f" offset {value.storage_offset()}" if value.storage_offset() else ""
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{layout}{offset}"
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return f"[{len(value)} tensors]"
        return repr(value)

    return ", ".join(f"{name}={short(value)}" for name, value in call.items())


def disagreements(op: str, function: Callable[..., Any], dtype: torch.dtype, *, seed: int = 0) -> Iterator[Disagreement]:
    """Compare a function with the reference over the op's sample calls.

    Args:
        op: name of the op.
        function: takes every argument of the op by position, such as ``q_core.bound(op)`` or a backend's own function.
        dtype: of the floating tensors.
        seed: of the samples.

    Yields:
        What disagrees; nothing if all agrees.
    """
    record = record_of(op)
    for call in record.samples(Make(seed), dtype):
        yield from disagreements_of(record, function, call)


def disagreements_of(record: OpRecord, function: Callable[..., Any], call: Arguments) -> Iterator[Disagreement]:
    """Compare a function with the reference on one call of CPU tensors, which is left as it is."""
    expected, bounds = expected_outputs(record, call)
    for name, value in run(record, function, copy_call(call)).items():
        message = compare(value, expected[name], bounds[name])
        if message:
            yield Disagreement(record.name, describe(call), name, message)
