"""The tiles of CDNA 2 and 3 (MI200, MI300), where the portable ones aren't best."""

from __future__ import annotations

from q_triton.tiles import Table, tile

_MOE = (
    tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, GROUP_T=8, PROGRAMS=608, warps=4, stages=2, up_to=12),
    tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, PROGRAMS=304, warps=4, stages=2, up_to=64),
    tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=8, stages=2),
)

TABLE: Table = {
    "moe_gemm": _MOE,
    "moe_gemm_codes": _MOE,
    "moe_gemm_4bit": _MOE,
}
