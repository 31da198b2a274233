"""The tiles of CDNA 2 and 3 (MI200, MI300), where the portable ones aren't best.

These chips have more registers, and wider matrix instructions, than other GPUs of AMD's.
"""

from __future__ import annotations

from q_triton.tiles import Table, tile

_MOE = (
    tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, GROUP_T=8, PROGRAMS=608, warps=4, stages=2, up_to=12),
    tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=64, GROUP_T=8, PROGRAMS=304, warps=4, stages=2, up_to=64),
    tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=32, GROUP_T=8, PROGRAMS=1, warps=8, stages=2),
)

TABLE: Table = {
    "decode_attention": (tile(BLOCK_M=32, BLOCK_N=64, stages=2, up_to=128), tile(BLOCK_M=32, BLOCK_N=32, stages=2)),
    "decode_attention_codes": (tile(BLOCK_M=32, BLOCK_N=32, stages=2),),
    "decode_attention_float32": (tile(BLOCK_M=16, BLOCK_N=32, stages=2, up_to=128), tile(BLOCK_M=16, BLOCK_N=16)),
    "prefill_attention": (tile(BLOCK_M=64, BLOCK_N=64, stages=2, up_to=128), tile(BLOCK_M=64, BLOCK_N=32)),
    "prefill_attention_codes": (tile(BLOCK_M=64, BLOCK_N=32, up_to=128), tile(BLOCK_M=32, BLOCK_N=32)),
    "prefill_attention_float32": (tile(BLOCK_M=64, BLOCK_N=32, up_to=128), tile(BLOCK_M=32, BLOCK_N=16)),
    "moe_gemm": _MOE,
    "moe_gemm_codes": _MOE,
    "moe_gemm_4bit": _MOE,
}
