"""q-core: one surface of quantized-ML operations, and the dispatch that finds who serves them.

Importing this package loads no backend, probes no device and allocates no tensor; torch itself is imported when an attribute is first
used, so that command-line help doesn't wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from q_core import ops
    from q_core.backend import Availability, Backend, BackendConflictError, BackendError, NoBackendError, impl
    from q_core.dispatch import bound, use_backends
    from q_core.explanation import Explanation, explain
    from q_core.formats.four_bit import FourBit
    from q_core.formats.fp8_rows import Fp8Rows
    from q_core.formats.grouped_int import AffineGroups, SuperGroups
    from q_core.formats.int8_rows import Int8Rows
    from q_core.formats.quantized_tensor import QuantizedTensor

_WHERE = {
    "AffineGroups": "q_core.formats.grouped_int",
    "Availability": "q_core.backend",
    "Backend": "q_core.backend",
    "BackendConflictError": "q_core.backend",
    "BackendError": "q_core.backend",
    "Explanation": "q_core.explanation",
    "FourBit": "q_core.formats.four_bit",
    "Fp8Rows": "q_core.formats.fp8_rows",
    "Int8Rows": "q_core.formats.int8_rows",
    "NoBackendError": "q_core.backend",
    "QuantizedTensor": "q_core.formats.quantized_tensor",
    "SuperGroups": "q_core.formats.grouped_int",
    "bound": "q_core.dispatch",
    "explain": "q_core.explanation",
    "impl": "q_core.backend",
    "use_backends": "q_core.dispatch",
}

__version__ = "0.1.0"

__all__ = [
    "AffineGroups",
    "Availability",
    "Backend",
    "BackendConflictError",
    "BackendError",
    "Explanation",
    "FourBit",
    "Fp8Rows",
    "Int8Rows",
    "NoBackendError",
    "QuantizedTensor",
    "SuperGroups",
    "bound",
    "explain",
    "impl",
    "ops",
    "use_backends",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("q_core.ops")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
