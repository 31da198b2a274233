"""The environment variables of q_triton, all of them.

- ``TRITON_INTERPRET``: Triton's own; set to 1 before Triton is imported, kernels are interpreted on the CPU.
- ``Q_TRITON_TARGET``: the target whose tiles the interpreter uses, such as ``sm_90``: its backend then serves the CPU.
- ``Q_TRITON_CACHE``: the folder of what ``python -m q_triton.tune`` found; ``q_triton`` in the user's cache folder unless set.
- ``XDG_CACHE_HOME``: the user's cache folder, ``~/.cache`` unless set.
"""

from __future__ import annotations

import os
from pathlib import Path


def interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def interpreted_target() -> str | None:
    """The target to interpret for: ``Q_TRITON_TARGET``, or ``None`` if it is unset or kernels are compiled."""
    return (os.environ.get("Q_TRITON_TARGET") or None) if interpreted() else None


def cache_folder() -> Path:
    """Where tuned tiles are kept."""
    if (folder := os.environ.get("Q_TRITON_CACHE")) is not None:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "q_triton"
