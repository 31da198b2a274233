"""The tiles of Intel's architectures, where the portable ones aren't best. A new architecture is a new entry."""

from __future__ import annotations

from q_triton.tiles import Table, register

TILES: dict[str, Table] = {
    "xe": {},
}

register(TILES)
