"""Calls of an op that hypothesis draws: sizes, settings, values, and where the tensors lie in memory.

What a call consists of is known to the op's sample generator alone (``OpRecord.samples``); here it gets a :class:`DrawnMake` instead of the
seeded one. Layouts are drawn afterwards, for any op alike: the record's check says which of them an argument may have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from q_core.record import Arguments, OpRecord
from q_core.samples.make import Case, Make
from q_core.specs.check import FLOATS
from q_core.testing.agreement import describe, map_call, map_tensors, tensors_of

Draw = Callable[[st.SearchStrategy[Any]], Any]

GUARD = 8
"""Elements before and after a tensor in its storage that nobody may write to; one more before it makes it misaligned."""

STYLES = ("normal", "grid", "sparse", "tiny", "large")
LAYOUTS = ("plain", "offset", "strided", "transposed", "expanded")


class Call(dict[str, Any]):
    """Arguments by name, that hypothesis prints in one line."""

    def __repr__(self) -> str:
        return f"({describe(self)})"


class DrawnMake(Make):
    """A :class:`Make` whose sizes, settings and kind of values are drawn; the values themselves come from a drawn seed."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw(st.integers(0, 2**20)))
        self._draw = draw
        self._style: str = draw(st.sampled_from(STYLES))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        values = super().normal(*shape, scale=scale)
        if self._style == "grid":  # ties, equal maxima, exact zeros
            values = (values * 2).round() / 2
        elif self._style == "sparse":
            values = values * (super().uniform(*shape) < 0.3)
        elif self._style == "tiny":  # among the subnormal numbers of the output's dtype
            values = values * (torch.finfo(dtype).smallest_normal / 64)
        elif self._style == "large":
            values = values * 8
        return values.to(dtype)

    def choice(self, options: Sequence[int]) -> int:
        chosen: int = self._draw(st.sampled_from(options))
        return chosen

    def cases(self, table: Iterable[Case], draw: Callable[[Make], Case]) -> Iterable[Case]:
        return (draw(self),)

    def option(self, usual: int, *others: int) -> int:
        return self.choice((usual, *others))

    def size(self, low: int, high: int) -> int:
        drawn: int = self._draw(st.integers(low, high))
        return drawn


class LargeMake(Make):
    """A :class:`Make` of one call a case with long axes, so that an implementation has something to split among threads.

    Only axes that nothing else depends on grow: those of :meth:`shape`.
    """

    FACTOR = 6

    def cases(self, table: Iterable[Case], draw: Callable[[Make], Case]) -> Iterable[Case]:
        return (draw(self),)

    def size(self, low: int, high: int) -> int:
        return high

    def shape(self, *highs: int) -> tuple[int, ...]:
        return tuple(high * self.FACTOR for high in highs)


def _offset(tensor: Tensor, misaligned: int) -> Tensor:
    """The same values, contiguous, away from the edges of their storage."""
    storage = torch.zeros(tensor.numel() + 2 * GUARD + misaligned, dtype=tensor.dtype, device=tensor.device)
    start = GUARD + misaligned
    view = storage[start : start + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def _strided(tensor: Tensor) -> Tensor:
    """The same values, every second one of a longer last axis; what lies between is not to be read."""
    if tensor.dim() == 0:
        return _offset(tensor, 1)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 1, dtype=tensor.dtype, device=tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _transposed(tensor: Tensor) -> Tensor:
    """The same values, with the first axis the fastest."""
    return tensor if tensor.dim() < 2 else tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _expanded(tensor: Tensor) -> Tensor:
    """Other values: the first row again and again, at stride 0."""
    if tensor.dim() < 2 or not tensor.shape[0] or not tensor.is_floating_point():
        return tensor
    return tensor[:1].clone().expand(tensor.shape)


_LAY: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda tensor: tensor.contiguous(),
    "offset": lambda tensor: _offset(tensor, 1),
    "strided": _strided,
    "transposed": _transposed,
    "expanded": _expanded,
}


def laid_out(record: OpRecord, call: Mapping[str, Any], layouts: Mapping[str, str]) -> Call:
    """The call with its arguments in other layouts, as far as the op's contract allows them."""
    result = Call(call)
    for name, layout in layouts.items():
        allowed = layout if name not in record.mutates or layout == "plain" else "offset"
        attempt = Call(result) | {name: map_tensors(_LAY[allowed], result[name])}
        try:
            record.check(**attempt)
        except ValueError:  # the contract asks for a contiguous one
            attempt[name] = map_tensors(_LAY["offset"], result[name])
        result = Call(attempt)
    return result


def _draw_layouts(draw: Draw, record: OpRecord, call: Arguments) -> dict[str, str]:
    return {name: draw(st.sampled_from(LAYOUTS)) for name, value in call.items() if tensors_of(value)}


def _nth(calls: Iterable[Arguments], draw: Draw) -> Arguments:
    made = list(calls)
    index: int = draw(st.integers(0, len(made) - 1))
    return made[index]


@st.composite
def calls(draw: Draw, record: OpRecord, device: str = "cpu") -> Call:
    """Valid calls of an op: any float dtype, odd and zero sizes, partial blocks, every layout that the contract allows."""
    dtype = draw(st.sampled_from(FLOATS))
    call = _nth(record.samples(DrawnMake(draw), dtype), draw)
    on_device = map_call(lambda tensor: tensor.to(device), call)
    return laid_out(record, on_device, _draw_layouts(draw, record, on_device))


def activation(record: OpRecord, call: Mapping[str, Any]) -> str | None:
    """The argument whose values are a user's data, and so may be anything: the first floating one that is only read."""
    for name in record.arguments:
        tensors = tensors_of(call[name])
        if name not in record.mutates and tensors and tensors[0].is_floating_point():
            return name
    return None


@st.composite
def calls_with_non_finite_values(draw: Draw, record: OpRecord, device: str = "cpu") -> Call:
    """Calls with NaN or infinity somewhere in the activation."""
    call = draw(calls(record, device))
    name = activation(record, call)
    filled = [tensor for tensor in tensors_of(call[name]) if tensor.numel()] if name else []
    if name is None or not filled:
        return Call(call)
    # Expanded tensors share elements; a plain copy takes a value in one place.
    call[name] = map_tensors(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), call[name])
    filled = [tensor for tensor in tensors_of(call[name]) if tensor.numel()]
    for value in draw(st.lists(st.sampled_from((math.nan, math.inf, -math.inf)), min_size=1, max_size=3)):
        flat = filled[draw(st.integers(0, len(filled) - 1))].view(-1)
        flat[draw(st.integers(0, flat.numel() - 1))] = value
    return Call(call)


def sample_calls(
    record: OpRecord, dtype: torch.dtype, device: str = "cpu", make: Make | None = None, most: int | None = None
) -> list[Call]:
    """The record's own samples, on a device."""
    made = itertools.islice(record.samples(make or Make(), dtype), most)
    return [Call(map_call(lambda tensor: tensor.to(device), call)) for call in made]


def as_autocast_casts(record: OpRecord, call: Mapping[str, Any], dtype: torch.dtype) -> Call:
    """The call with the arguments cast that autocast casts."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype in FLOATS else tensor

    return Call(dict(call) | {name: map_tensors(cast, call[name]) for name in record.autocast})


@dataclass(frozen=True, slots=True)
class BadCall:
    """A call that the contract refuses, for one wrong argument, and the error that it documents."""

    argument: str
    what: str
    call: Call
    error: TypeError | ValueError


def _wrong_tensors(value: Any) -> Iterator[tuple[str, Any]]:
    yield "a complex tensor", map_tensors(lambda tensor: tensor.to(torch.complex64), value)
    yield "a number", [3.0 for _ in value] if isinstance(value, list) else 3.0
    yield "on another device", map_tensors(lambda tensor: tensor.to("meta"), value)
    yield "of nine axes more", map_tensors(lambda tensor: tensor[(None,) * 9], value)
    yield "one element longer", map_tensors(lambda tensor: torch.cat((tensor.flatten(), tensor.flatten()[:1])), value)


def _wrong_settings(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, str):
        yield "no such name", "nonesuch"
    elif isinstance(value, torch.dtype):
        yield "another dtype", torch.complex64
    elif isinstance(value, list) and value:
        yield "a length too many", [*value, 3]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield "negative", type(value)(-1)
        yield "far too large", type(value)(2**40)


def bad_calls(record: OpRecord, device: str = "cpu") -> list[BadCall]:
    """Calls with one wrong argument: each way to be wrong that the op's check refuses."""
    call = sample_calls(record, torch.float32, device, most=1)[0]
    bad = []
    for name, value in call.items():
        for what, wrong in _wrong_tensors(value) if tensors_of(value) else _wrong_settings(value):
            changed = Call(call | {name: wrong})
            try:
                record.check(**changed)
            except (TypeError, ValueError) as error:
                bad.append(BadCall(name, what, changed, error))
    return bad
