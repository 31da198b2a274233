"""Compiles the implementations that may serve an op on a device type into one flat function.

The function's code is generated, so that a call costs a few comparisons and no unpacking. For a backend with a predicate that leaves out
an argument, before one without conditions, it reads::

    def gemm_4bit(x_TK, packed, absmax, blocksize, quant_type, shape, bias):
        if bias is neutral_0_bias and accepts_0(quant_type) is None:
            return impl_0(x_TK, packed, absmax, blocksize, quant_type, shape)
        return impl_1(x_TK, packed, absmax, blocksize, quant_type, shape, bias)
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from q_core.backend import NoBackendError
from q_core.environment import FallbackPolicy
from q_core.record import OpRecord
from q_core.registry import Implementation

logger = logging.getLogger("q")


def decline_reason(implementation: Implementation, record: OpRecord, arguments: Mapping[str, Any]) -> str | None:
    """Why an implementation doesn't serve a call, or ``None`` if it does."""
    for name in record.arguments:
        if name not in implementation.arguments and arguments[name] != record.neutral[name]:
            return f"it doesn't know the argument {name}"
    if implementation.accepts is None:
        return None
    return implementation.accepts(**{name: arguments[name] for name in inspect.signature(implementation.accepts).parameters})


class _Fallback:
    """The reference at the end of a chain: says once that it serves, or refuses to."""

    def __init__(self, record: OpRecord, device_type: str, chain: Sequence[Implementation], policy: FallbackPolicy) -> None:
        self._record, self._device_type, self._policy = record, device_type, policy
        self._declined, self._reference = chain[:-1], chain[-1].function
        self._positions = [record.arguments.index(name) for name in chain[-1].arguments]
        self._said = False

    def __call__(self, *arguments: Any) -> Any:
        if self._policy == "error":
            raise NoBackendError(f"{self._why(arguments)}, and Q_FALLBACK=error refuses the reference.")
        if not self._said:
            self._said = True
            logger.warning("%s; the reference serves it, slowly.", self._why(arguments))
        return self._reference(*[arguments[i] for i in self._positions])

    def _why(self, arguments: Sequence[Any]) -> str:
        return no_backend(self._record, self._device_type, self._declined, arguments)


def no_backend(record: OpRecord, device_type: str, chain: Sequence[Implementation], arguments: Sequence[Any]) -> str:
    """«op on device: no backend serves this call (name: reason; …)»."""
    named = dict(zip(record.arguments, arguments, strict=True))
    reasons = [f"{i.backend.name}: {decline_reason(i, record, named)}" for i in chain]
    return f"{record.name} on {device_type}: no backend serves this call ({'; '.join(reasons) or 'none is installed for it'})"


class Trampoline:
    """The function that torch calls for an op on a device type, from the import of q_core on.

    Which implementations it leads to may change, and a look-up of the current ones would cost each call a tenth of what the dispatcher
    does. So the function stays the same object, and its code is replaced.

    Attributes:
        function: of the op's arguments, by position.
    """

    def __init__(self, record: OpRecord, device_type: str, load: Callable[[Trampoline], None]) -> None:
        """``load`` is called at the first call after a :meth:`reset`, and calls :meth:`lead_to`."""
        self._record, self.device_type, self._load = record, device_type, load
        self._generation = 0
        self._globals: dict[str, Any] = {}
        exec(f"def {record.name}(): ...", self._globals)
        self.function: FunctionType = self._globals[record.name]
        self.reset()

    @property
    def op(self) -> str:
        return self._record.name

    def reset(self) -> None:
        """Ask ``load`` at the next call: importing q_core loads no backend."""

        def first_call(*arguments: Any) -> Any:
            self._load(self)
            return self.function(*arguments)

        names = self._new_names()
        self._become([f"return {names.give('load', first_call)}({', '.join(self._record.arguments)})"], names)

    def lead_to(self, chain: Sequence[Implementation], device_type: str, fallback: FallbackPolicy) -> None:
        """Call the first implementation of ``chain`` that accepts a call."""
        names = self._new_names()
        self._become(_body(self._record, device_type, chain, fallback, names), names)

    def _new_names(self) -> _Names:
        self._generation ^= 1
        return _Names(self._generation)

    def _become(self, lines: Sequence[str], names: _Names) -> None:
        made: dict[str, Any] = {}
        source = "\n    ".join([f"def {self.op}({', '.join(self._record.arguments)}):", *lines])
        exec(compile(source, f"<q::{self.op} on {self.device_type}>", "exec"), made)
        self._globals.update(names)
        self.function.__code__ = made[self.op].__code__


class _Names(dict[str, Any]):
    """What the names in a function's code mean. Two generations differ: a call under way in another thread finishes with its own."""

    def __init__(self, generation: int) -> None:
        super().__init__()
        self._generation = generation

    def give(self, name: str, value: Any) -> str:
        """Name a value; returns what the code is to call it."""
        unique = f"{name}_{'ab'[self._generation]}"
        self[unique] = value
        return unique


def _body(
    record: OpRecord, device_type: str, chain: Sequence[Implementation], fallback: FallbackPolicy, names: _Names
) -> list[str]:
    """The lines of a function that calls the first implementation of ``chain`` that accepts a call."""
    arguments = record.arguments
    lines = []
    for i, implementation in enumerate(chain):
        conditions = []
        for argument in arguments:
            if argument not in implementation.arguments:
                neutral = record.neutral[argument]
                name = names.give(f"neutral_{i}_{argument}", neutral)
                conditions.append(f"{argument} {'is' if neutral is None else '=='} {name}")
        if implementation.accepts is not None:
            name = names.give(f"accepts_{i}", implementation.accepts)
            conditions.append(f"{name}({', '.join(inspect.signature(implementation.accepts).parameters)}) is None")
        function: Callable[..., Any] = implementation.function
        passed = implementation.arguments
        if implementation.backend.name == "reference":
            function, passed = _Fallback(record, device_type, chain[: i + 1], fallback), arguments
        call = f"{names.give(f'impl_{i}', function)}({', '.join(passed)})"
        if record.mutates:
            call = f"{names.give('mutated', _mutated)}({call}, {', '.join(record.mutates)})"
        lines.append(f"if {' and '.join(conditions)}: return {call}" if conditions else f"return {call}")
        if not conditions:
            break
    else:

        def nobody(*values: Any) -> None:
            raise NoBackendError(f"{no_backend(record, device_type, chain, values)}.")

        lines.append(f"{names.give('nobody', nobody)}({', '.join(arguments)})")
    return lines


def _mutated(result: None, *arguments: Tensor | list[Tensor] | None) -> None:
    """Bump the version counters of what was mutated, which raw kernels don't: autograd would use what it had saved, changed since."""
    for argument in arguments:
        if argument is not None:
            torch.autograd.graph.increment_version([argument] if isinstance(argument, Tensor) else argument)
