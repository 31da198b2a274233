"""Finding the OpenMP runtime that torch has loaded.

A process can hold several (a system's libgomp, scikit-learn's, MKL's libiomp5), each with its own pool. Looking a symbol up through the
handle of torch's own library searches that library's dependencies, so it finds the runtime that torch itself calls, whatever its name.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib")


def gomp_parallel_address() -> int | None:
    """Address of ``GOMP_parallel`` in torch's OpenMP runtime, or ``None`` if torch has none that offers it."""
    for name in _LIBRARIES:
        path = Path(torch.__file__).parent / "lib" / name
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            entry = library.GOMP_parallel
        except (OSError, AttributeError):  # not loaded from there; loaded, but built without OpenMP
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value
    return None
