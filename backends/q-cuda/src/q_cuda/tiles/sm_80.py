"""The tiles of sm_80 (A100), where the portable ones aren't best."""

from __future__ import annotations

from q_cuda.tiles.common import COMMON
from q_triton.tiles import Table, tile

_FEW = tile(BLOCK_T=16, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=432, warps=4, stages=4, up_to=12)
_SOME = tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, PROGRAMS=216, warps=4, stages=4, up_to=64)
_MANY = tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=8, stages=4)

TABLE: Table = {
    **COMMON,
    "optimizer_8bit": (
        tile(BLOCK=512, warps=1, up_to=512),
        tile(BLOCK=1024, warps=4, up_to=1024),
        tile(BLOCK=2048, warps=8, up_to=2048),
        tile(BLOCK=4096, warps=8),
    ),
    "int8_gemm": (
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, warps=4, stages=4, up_to=64),
        tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP_T=8, warps=8, stages=4),
    ),
    "gemm_int8_weight": (
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, warps=4, stages=4, up_to=64),
        tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, warps=8, stages=4),
    ),
    "decode_attention": (tile(BLOCK_M=32, BLOCK_N=64, stages=3, up_to=128), tile(BLOCK_M=32, BLOCK_N=32, stages=3)),
    "decode_attention_codes": (
        tile(BLOCK_M=32, BLOCK_N=64, warps=8, stages=3, up_to=128),
        tile(BLOCK_M=32, BLOCK_N=32, warps=8, stages=3),
    ),
    "prefill_attention": (
        tile(BLOCK_M=128, BLOCK_N=64, warps=8, stages=3, up_to=128),
        tile(BLOCK_M=64, BLOCK_N=32, warps=8, stages=2),
    ),
    "prefill_attention_codes": (
        tile(BLOCK_M=64, BLOCK_N=64, warps=8, stages=2, up_to=128),
        tile(BLOCK_M=64, BLOCK_N=32, warps=8, stages=2),
    ),
    "prefill_attention_float32": (
        tile(BLOCK_M=32, BLOCK_N=16, up_to=64),
        tile(BLOCK_M=16, BLOCK_N=16, warps=8, up_to=128),
        tile(BLOCK_M=16, BLOCK_N=16),
    ),
    "moe_gemm": (tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, GROUP_T=8, PROGRAMS=432, warps=4, stages=4, up_to=12), _SOME, _MANY),
    "moe_gemm_codes": (_FEW, _SOME, _MANY),
    "moe_gemm_4bit": (_FEW, _SOME, _MANY),
}
