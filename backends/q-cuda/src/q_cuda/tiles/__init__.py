"""The tiles of NVIDIA's architectures, a file for each that has better ones than the portable. A new architecture is a new file."""

from __future__ import annotations

from q_cuda.tiles import sm_80, sm_90
from q_triton.tiles import Table, register

TILES: dict[str, Table] = {"sm_80": sm_80.TABLE, "sm_90": sm_90.TABLE}

register(TILES)
