"""The tiles of NVIDIA's architectures, where the portable ones aren't best. A new architecture is a new entry."""

from __future__ import annotations

from q_triton.tiles import Table, register, tile

TILES: dict[str, Table] = {
    "sm_80": {},
    "sm_90": {
        "quantize_blockwise": (tile(BLOCK=4096, warps=4),),
        "gemm_4bit": (
            tile(BLOCK_T=16, BLOCK_N=128, BLOCK_K=64, PROGRAMS=512, warps=4, stages=3, up_to=16),
            tile(BLOCK_T=32, BLOCK_N=128, BLOCK_K=64, PROGRAMS=384, warps=4, stages=3, up_to=32),
            tile(BLOCK_T=64, BLOCK_N=128, BLOCK_K=64, PROGRAMS=384, warps=4, stages=3, up_to=64),
            tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, PROGRAMS=256, warps=8, stages=3, up_to=256),
            tile(),  # from here on, decoded first
    "sm_80": {
        "moe_gemm": (
            tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, GROUP_T=8, PROGRAMS=432, warps=4, stages=4, up_to=12),
            tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, PROGRAMS=216, warps=4, stages=4, up_to=64),
            tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=8, stages=4),
        ),
        "moe_gemm_codes": (
            tile(BLOCK_T=16, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=432, warps=4, stages=4, up_to=12),
            tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, PROGRAMS=216, warps=4, stages=4, up_to=64),
            tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=8, stages=4),
        ),
        "moe_gemm_4bit": (
            tile(BLOCK_T=16, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=432, warps=4, stages=4, up_to=12),
            tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, PROGRAMS=216, warps=4, stages=4, up_to=64),
            tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=8, stages=4),
        ),
    },
    "sm_90": {
        "moe_gemm": (
            tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, GROUP_T=8, PROGRAMS=528, warps=4, stages=4, up_to=12),
            tile(BLOCK_T=64, BLOCK_N=128, BLOCK_K=64, GROUP_T=8, PROGRAMS=264, warps=4, stages=4, up_to=64),
            tile(BLOCK_T=128, BLOCK_N=256, BLOCK_K=64, GROUP_T=8, PROGRAMS=1, warps=8, stages=4),
        ),
        "moe_gemm_codes": (
            tile(BLOCK_T=16, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=528, warps=4, stages=4, up_to=12),
            tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=264, warps=4, stages=4, up_to=64),
            tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP_T=8, PROGRAMS=1, warps=8, stages=4),
        ),
        "moe_gemm_4bit": (
            tile(BLOCK_T=16, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=528, warps=4, stages=4, up_to=12),
            tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=264, warps=4, stages=4, up_to=64),
            tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP_T=8, PROGRAMS=1, warps=8, stages=4),
        ),
    },
}

register(TILES)
