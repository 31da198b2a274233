"""The tiles that sm_80 and what came after it have in common."""

from __future__ import annotations

from q_triton.tiles import Table, tile

COMMON: Table = {
    # The tokens are the right operand, whose tiles may have 8 columns here.
    "int8_gemm_few": (
        tile(BLOCK_T=8, BLOCK_N=16, BLOCK_K=128, SLICES=4, warps=4, stages=5, up_to=8),
        tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, SLICES=4, warps=4, stages=4),
    ),
    "gemm_int8_weight_few": (
        tile(BLOCK_T=8, BLOCK_N=16, BLOCK_K=128, SLICES=4, warps=4, stages=4, up_to=8),
        tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=64, SLICES=4, warps=4, stages=4),
    ),
    "decode_attention_float32": (
        tile(BLOCK_M=16, BLOCK_N=16, up_to=64),
        tile(BLOCK_M=16, BLOCK_N=16, warps=8),
    ),
}
