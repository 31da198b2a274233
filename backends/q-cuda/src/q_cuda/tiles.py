"""The tiles of NVIDIA's architectures, where the portable ones aren't best. A new architecture is a new entry."""

from __future__ import annotations

from q_triton.tiles import Table, register, tile

TILES: dict[str, Table] = {
    "sm_80": {},
    "sm_90": {
        "quantize_blockwise": (tile(BLOCK=4096, warps=4),),
    },
}

register(TILES)
