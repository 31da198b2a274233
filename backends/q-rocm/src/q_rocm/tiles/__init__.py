"""The tiles of AMD's architectures, a file for each that has better ones than the portable. A new architecture is a new file."""

from __future__ import annotations

from q_rocm.tiles import cdna
from q_triton.tiles import Table, register

TILES: dict[str, Table] = {"gfx90a": cdna.TABLE, "gfx942": cdna.TABLE}

register(TILES)
