"""The tiles of AMD's architectures, where the portable ones aren't best. A new architecture is a new entry."""

from __future__ import annotations

from q_triton.tiles import Table, register, tile

_CDNA: Table = {
    kernel: (
        tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, GROUP_T=8, PROGRAMS=608, warps=4, stages=2, up_to=12),
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, PROGRAMS=304, warps=4, stages=2, up_to=64),
        tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=8, stages=2),
    )
    for kernel in ("moe_gemm", "moe_gemm_codes", "moe_gemm_4bit")
}

TILES: dict[str, Table] = {
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx1100": {},
}

register(TILES)
