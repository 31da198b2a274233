"""The tiles of NVIDIA's architectures, where the portable ones aren't best. A new architecture is a new entry."""

from __future__ import annotations

from q_triton.tiles import Table, register, tile

TILES: dict[str, Table] = {
    "sm_80": {},
    "sm_90": {
        "gemm_4bit": (
            tile(BLOCK_T=16, BLOCK_N=128, BLOCK_K=128, PROGRAMS=512, warps=4, stages=3, up_to=16),
            tile(BLOCK_T=32, BLOCK_N=128, BLOCK_K=64, PROGRAMS=384, warps=4, stages=3, up_to=32),
            tile(BLOCK_T=64, BLOCK_N=128, BLOCK_K=64, PROGRAMS=384, warps=4, stages=3, up_to=64),
            tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, PROGRAMS=256, warps=8, stages=3, up_to=256),
            tile(),  # from here on, decoded first
        ),
    },
}

register(TILES)
