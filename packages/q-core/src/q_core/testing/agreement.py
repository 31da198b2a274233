"""Agreement of an implementation with the reference: exact where the contract is, within the record's bound elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q_core.record import Arguments, OpRecord
from q_core.samples.make import Make
from q_core.specs import record_of


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One output of one call that is not what the reference says."""

    op: str
    call: str
    output: str
    message: str

    def __str__(self) -> str:
        return f"{self.op}({self.call}): {self.output} {self.message}"


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.preserve_format)
    return [_clone(v) for v in value] if isinstance(value, list) else value


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return [_double(v) for v in value] if isinstance(value, list) else value


def _run(record: OpRecord, function: Callable[..., Any], call: Arguments) -> dict[str, Any]:
    """Outputs by name: the results, or the arguments that were mutated."""
    result = function(*(call[name] for name in record.arguments))
    if record.mutates:
        return {name: call[name] for name in record.mutates}
    results = result if isinstance(result, tuple) else (result,)
    return {f"output {i}": value for i, value in enumerate(results)}


def reference_function(record: OpRecord) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f"q_core.reference.{record.family}"), record.name)
    return function


def expected_outputs(record: OpRecord, call: Arguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the reference gives, and how far from it a result may be (``None``: not at all)."""
    clone = {name: _clone(value) for name, value in call.items()}
    if record.bound is None:
        exact = _run(record, reference_function(record), clone)
        return exact, dict.fromkeys(exact)
    wide = {name: _double(value) for name, value in clone.items()}
    # Scales, code books and states are float32 by contract; widening them would change the rule that is tested.
    expected = _run(record, reference_function(record), wide)
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


def _compare(got: Any, expected: Any, bound: Any) -> str | None:
    if isinstance(got, list):
        for i, item in enumerate(got):
            message = _compare(item, expected[i], None if bound is None else bound[i])
            if message:
                return f"[{i}] {message}"
        return None
    if got.shape != expected.shape:
        return f"has shape {list(got.shape)}, expected {list(expected.shape)}"
    if bound is None:
        if got.dtype is not expected.dtype:
            return f"has dtype {got.dtype}, expected {expected.dtype}"
        same = (got == expected) | (got.isnan() & expected.isnan())
        return None if bool(same.all()) else f"differs in {int((~same).sum())} of {same.numel()} elements, expected equality"
    error = (got.double() - expected.double()).abs()
    wrong = ~(error <= bound)
    wrong &= ~(got.isnan() & expected.isnan())
    if not bool(wrong.any()):
        return None
    return f"misses in {int(wrong.sum())} of {wrong.numel()} elements, at most by {float(error[wrong].max()):.3g}"


def _describe(call: Arguments) -> str:
    def short(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
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
        expected, bounds = expected_outputs(record, call)
        got = _run(record, function, {name: _clone(value) for name, value in call.items()})
        for name, value in got.items():
            message = _compare(value, expected[name], bounds[name])
            if message:
                yield Disagreement(op, _describe(call), name, message)
