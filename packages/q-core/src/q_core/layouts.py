"""Weight layouts: the canonical one, and private ones that a backend makes of it."""

from __future__ import annotations

from typing import Literal

from q_core.formats.codebooks import FourBitType

CANONICAL = "canonical"
"""The layout that every backend takes, and the only one that leaves the process."""

WeightFormatName = Literal["dense", "int8"] | FourBitType


def decline_private(layout: str) -> str | None:
    """Why a weight isn't one for an implementation that takes the canonical layout only, or ``None``."""
    return None if layout == CANONICAL else f"layout {layout!r} is private to another backend; unpack_weight brings it back"
