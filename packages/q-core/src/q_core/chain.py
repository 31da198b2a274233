"""Compiles the implementations that may serve an op on a device type into one flat function.

The function is generated, so that a call costs a few comparisons and no unpacking. For a backend with a predicate that leaves out an
argument, before one without conditions, it reads::

    def gemm_4bit(x_TK, packed, absmax, blocksize, quant_type, shape, bias):
        if bias is neutral_0_bias and accepts_0(quant_type) is None:
            return impl_0(x_TK, packed, absmax, blocksize, quant_type, shape)
        return impl_1(x_TK, packed, absmax, blocksize, quant_type, shape, bias)
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def compile_chain(
    record: OpRecord, device_type: str, chain: Sequence[Implementation], fallback: FallbackPolicy
) -> Callable[..., Any]:
    """One function of the op's arguments that calls the first implementation that accepts them."""
    arguments = record.arguments
    names: dict[str, Any] = {}
    lines = [f"def {record.name}({', '.join(arguments)}):"]
    for i, implementation in enumerate(chain):
        conditions = []
        for argument in arguments:
            if argument not in implementation.arguments:
                neutral = record.neutral[argument]
                names[f"neutral_{i}_{argument}"] = neutral
                conditions.append(f"{argument} {'is' if neutral is None else '=='} neutral_{i}_{argument}")
        if implementation.accepts is not None:
            names[f"accepts_{i}"] = implementation.accepts
            conditions.append(f"accepts_{i}({', '.join(inspect.signature(implementation.accepts).parameters)}) is None")
        passed = implementation.arguments
        names[f"impl_{i}"] = implementation.function
        if implementation.backend.name == "reference":
            names[f"impl_{i}"], passed = _Fallback(record, device_type, chain[: i + 1], fallback), arguments
        call = f"return impl_{i}({', '.join(passed)})"
        lines.append(f"    if {' and '.join(conditions)}: {call}" if conditions else f"    {call}")
        if not conditions:
            break
    else:

        def nobody(*values: Any) -> None:
            raise NoBackendError(f"{no_backend(record, device_type, chain, values)}.")

        names["nobody"] = nobody
        lines.append(f"    nobody({', '.join(arguments)})")
    exec(compile("\n".join(lines), f"<q::{record.name} on {device_type}>", "exec"), names)
    compiled: Callable[..., Any] = names[record.name]
    return compiled
