"""The host functions of this package, by op: for what calls them without q-core's dispatch, on torch's meta device for one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from q_core.record import Arguments
from q_core.specs import RECORDS
from q_triton.plugins import FAMILIES

Host = Callable[..., Any]


def implementations() -> dict[str, Host]:
    """Every function that :data:`q_triton.plugins.FAMILIES` marks with ``@impl``, in the surface's order."""
    found = {name: f for module in FAMILIES for name, f in vars(importlib.import_module(module)).items() if hasattr(f, "q_accepts")}
    return {op: found[op] for op in RECORDS if op in found}


def declined(host: Host, arguments: Arguments) -> str | None:
    """Why a host function doesn't take a call, ``None`` if it does."""
    accepts = getattr(host, "q_accepts")  # noqa: B009
    if accepts is None:
        return None
    reason: str | None = accepts(**{name: arguments[name] for name in inspect.signature(accepts).parameters})
    return reason


def call(host: Host, arguments: Arguments) -> Any:
    """Call a host function with those of an op's arguments that it takes."""
    return host(**{name: arguments[name] for name in inspect.signature(host).parameters})
