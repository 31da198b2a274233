"""The environment variables of q_cpu, all of them.

- ``Q_CPU_ISA``: the ISA level to use instead of the widest that the machine has: ``baseline``, ``avx2`` or ``avx512``.
"""

from __future__ import annotations

import os


def forced_isa() -> str | None:
    """``Q_CPU_ISA``, or ``None`` if it is unset or empty."""
    return os.environ.get("Q_CPU_ISA") or None
