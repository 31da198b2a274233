"""Whether the tensors of a call are what the op's record declares: dtypes, and axes that agree with each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from q_core.operand import Declared, Operand
from q_core.record import Arguments, OpRecord

_LETTER = re.compile(r"(\d*)([A-Za-z]'?)")
_RANGE = re.compile(r"(\d+)…(\d+)")


class DepartureError(ValueError):
    """A tensor that is not as declared."""


def departure(record: OpRecord, call: Arguments, results: Sequence[Any] = ()) -> str | None:
    """What of a call, or of its results where they are given, is not as declared; ``None`` if all is."""
    try:
        claims = list(_claims(record.operands, call, call))
        if results:
            claims += _claims(record.outputs, dict(zip(record.outputs, results, strict=True)), call)
        listed = {place for _, _, _, place in claims if place is not None}
        for at in sorted(listed) or [0]:
            _check(record, call, at, [(name, operand, tensor) for name, operand, tensor, place in claims if place in (None, at)])
    except DepartureError as departed:
        return str(departed)
    return None


def _claims(
    declared: Mapping[str, Declared], values: Mapping[str, Any], call: Arguments
) -> Iterator[tuple[str, Operand, Tensor, int | None]]:
    """Each tensor with what it should be, and its place in a list of any length."""
    for name, form in declared.items():
        value = values[name]
        if isinstance(form, Mapping):
            if call["format"] not in form:
                if value is not None:
                    raise DepartureError(f"{name} is given, and there is none of format {call['format']!r}")
                continue
            if value is None:
                raise DepartureError(f"{name} is missing, and format {call['format']!r} has one")
            form = form[call["format"]]
        if isinstance(form, tuple):
            if len(value) != len(form):
                raise DepartureError(f"{name} has {len(value)} tensors, declared are {len(form)}")
            yield from (
                (f"{name}[{i}]", operand, tensor, None) for i, (operand, tensor) in enumerate(zip(form, value, strict=True))
            )
        elif isinstance(value, list):
            yield from ((name, form, tensor, i) for i, tensor in enumerate(value))
        elif value is not None:
            yield name, form, value, None


def _check(record: OpRecord, call: Arguments, at: int, claims: list[tuple[str, Operand, Tensor]]) -> None:
    """Tensors that share their letters; of lists, those at one place."""
    shapes = [(name, axes, _as_shape(call[name])) for name, axes in record.sizes.items()]
    for name, operand, tensor in claims:
        allowed = [dtype for known in operand.dtypes for dtype in _dtypes(known, call, at)]
        if operand.dtypes and tensor.dtype not in allowed:
            raise DepartureError(f"{name} is {tensor.dtype}, declared is {operand.dtype_text}")
        shapes.append((name, operand.axes, (tensor.numel(),) if operand.flat else tuple(tensor.shape)))
    scope = {name: value for name, value in call.items() if isinstance(value, int) and not isinstance(value, bool)}
    sizes = [found for name, axes, shape in shapes for found in _sizes(name, axes, shape, scope)]
    for _, text, size in sizes:
        if bare := _LETTER.fullmatch(text):
            count, left = divmod(size, int(bare[1] or 1))
            if left:
                raise DepartureError(f"{name} has an axis of {size} where {text} is declared")
            scope.setdefault(bare[2], count)
    for name, text, size in sizes:
        if not _holds(text, size, scope):
            raise DepartureError(f"{name} has an axis of {size} where {text} is declared; {scope}")


def _as_shape(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _dtypes(known: torch.dtype | str, call: Arguments, at: int) -> Iterator[torch.dtype]:
    value = call[known] if isinstance(known, str) else known
    if isinstance(value, list):
        value = value[at]
    yield value.dtype if isinstance(value, Tensor) else value


def _sizes(name: str, axes: str, shape: tuple[int, ...], scope: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """An axis each, with what it should be; what ``...`` stands for is kept in the scope."""
    parts = axes.split(", ") if axes else []
    if "..." in parts:
        at, count = parts.index("..."), len(shape) - len(parts) + 1
        if count < 0:
            raise DepartureError(f"{name} has axes {list(shape)}, declared are [{axes}]")
        lead = shape[at : at + count]
        if scope.setdefault("...", lead) != lead:
            raise DepartureError(f"{name} has {list(lead)} where others have {list(scope['...'])}")
        scope["numel"] = math.prod(lead)
        parts[at : at + 1], shape = [], shape[:at] + shape[at + count :]
    if len(parts) != len(shape):
        raise DepartureError(f"{name} has axes {list(shape)}, declared are [{axes}]")
    yield from ((name, part, size) for part, size in zip(parts, shape, strict=True))


def _holds(text: str, size: int, scope: dict[str, Any]) -> bool:
    if bounds := _RANGE.fullmatch(text):
        return int(bounds[1]) <= size <= int(bounds[2])
    expression = re.sub(r"(\d)([A-Za-z])", r"\1 * \2", text).replace("'", "_")
    # Exact, and with nothing to call but ceil: the text is a record's.
    names = {name.replace("'", "_"): Fraction(value) for name, value in scope.items() if isinstance(value, int)}
    return bool(eval(expression, {"__builtins__": {}, "ceil": math.ceil}, names) == size)
