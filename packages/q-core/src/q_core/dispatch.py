"""Binds the op surface into torch's dispatcher, as the namespace ``q``.

For each op and dispatch key a *trampoline* is registered with ``torch.library``; its code is the compiled chain of the implementations
that may serve there. What each layer does, from the caller inwards:

1. Autocast key: casts activations and bias of the ops that say so, and lets autocast change nothing inside of any.
2. Autograd key: one handwritten kernel an op (a third of the cost of ``register_autograd``): records the formula of the op's record, or
   a backward that raises, where a gradient is asked for.
3. Device key: the trampoline calls the first implementation that accepts the call, and bumps the version counters of what is mutated.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, overload

import torch

from q_core.autograd import autograd_kernel
from q_core.chain import Trampoline
from q_core.record import OpRecord
from q_core.registry import Registry, registry, set_registry
from q_core.specs import RECORDS, record_of
from q_core.specs.check import FLOATS

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LIBRARY = torch.library.Library("q", "DEF")
"""Kept for the life of the process: a collected one takes its ops along."""

DISPATCH_KEYS = {
    "cpu": "CPU",
    "cuda": "CUDA",
    "xpu": "XPU",
    "mps": "MPS",
    "hpu": "HPU",
    "mtia": "MTIA",
    "maia": "MAIA",
    "privateuseone": "PrivateUse1",
}
"""Dispatch keys by torch device type."""


def _load(trampoline: Trampoline) -> None:
    device_type = trampoline.device_type
    if device_type == "privateuseone":
        device_type = torch._C._get_privateuse1_backend_name()
    loaded = registry()
    trampoline.lead_to(loaded.chain(trampoline.op, device_type), device_type, loaded.fallback)


_trampolines: list[Trampoline] = []


def _autocast_kernel(record: OpRecord, device_type: str, op: Any) -> Callable[..., Any]:
    positions = frozenset(record.arguments.index(name) for name in record.autocast)
    key = torch._C._parse_dispatch_key(f"Autocast{DISPATCH_KEYS[device_type]}")
    assert key is not None
    excluded = torch._C.DispatchKeySet(key)

    def kernel(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [
            argument.to(dtype) if i in positions and argument is not None and argument.dtype in FLOATS else argument
            for i, argument in enumerate(arguments)
        ]
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast)

    return kernel


def _define(record: OpRecord) -> None:
    schema = torch.library.infer_schema(record.hook, op_name=record.name, mutates_args=record.mutates)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    op = getattr(torch.ops.q, record.name).default
    by_key = {}
    for device_type, key in DISPATCH_KEYS.items():
        by_key[key] = Trampoline(record, device_type, _load)
        LIBRARY.impl(record.name, by_key[key].function, key)
    _trampolines.extend(by_key.values())
    torch.library.register_fake(f"q::{record.name}", record.fake, lib=LIBRARY)
    kernel = autograd_kernel(record, op, {key: trampoline.function for key, trampoline in by_key.items()})
    LIBRARY.impl(record.name, kernel, "Autograd", with_keyset=True)
    for device_type, key in DISPATCH_KEYS.items():
        LIBRARY.impl(record.name, _autocast_kernel(record, device_type, op), f"Autocast{key}")


for _record in RECORDS.values():
    _define(_record)


@overload
def bound(op: Callable[Parameters, Result]) -> Callable[Parameters, Result]: ...
@overload
def bound(op: str) -> Callable[..., Any]: ...
def bound(op: str | Callable[..., Any]) -> Callable[..., Any]:
    """The torch op itself, ``torch.ops.q.<op>.default``: takes every argument of the hook by position and validates nothing.

    For hot paths whose arguments are known to be right; a backend gets to see whatever is passed.

    Args:
        op: the op's hook (``q_core.hookspecs.gemm_4bit``), whose signature the result has for type checkers, or its name.

    Raises:
        ValueError: there is no such op.
    """
    name = record_of(op if isinstance(op, str) else op.__name__).name
    default: Callable[..., Any] = getattr(torch.ops.q, name).default
    return default


_selection_lock = threading.RLock()


def _reset() -> None:
    for trampoline in _trampolines:
        trampoline.reset()


@contextlib.contextmanager
def use_backends(*names: str) -> Iterator[None]:
    """Let only the named backends serve, in the whole process, while the context stands.

    Put it around compiled code, not inside. The reference is a backend like others: name it to allow it.

    Raises:
        ValueError: a name is not that of an available backend.
    """
    if not names:
        raise ValueError("use_backends: no names given, expected at least one backend, such as 'reference'.")
    loaded = registry()
    chosen = loaded.check_names(names)
    with _selection_lock:
        previous, loaded.selected = loaded.selected, chosen
        _reset()
    try:
        yield
    finally:
        with _selection_lock:
            loaded.selected = previous
            _reset()


@contextlib.contextmanager
def replaced_registry(replacement: Registry) -> Iterator[None]:
    """Dispatch through another registry, in the whole process, while the context stands: for tests of backends."""
    with _selection_lock:
        previous = set_registry(replacement)
        _reset()
    try:
        yield
    finally:
        with _selection_lock:
            set_registry(previous)
            _reset()
