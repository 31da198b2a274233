"""The tiles of sm_90 (H100, H200), where the portable ones aren't best."""

from __future__ import annotations

from q_cuda.tiles.common import COMMON
from q_triton.tiles import Table, tile

_MOE_CODES = (
    tile(BLOCK_T=16, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=528, warps=4, stages=4, up_to=12),
    tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, PROGRAMS=264, warps=4, stages=4, up_to=64),
    tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP_T=8, PROGRAMS=1, warps=8, stages=4),
)

TABLE: Table = {
    **COMMON,
    "quantize_blockwise": (tile(BLOCK=4096, warps=4),),
    "gemm_4bit": (
        tile(BLOCK_T=16, BLOCK_N=128, BLOCK_K=128, PROGRAMS=512, warps=4, stages=3, up_to=16),
        tile(BLOCK_T=32, BLOCK_N=128, BLOCK_K=64, PROGRAMS=384, warps=4, stages=3, up_to=32),
        tile(BLOCK_T=64, BLOCK_N=128, BLOCK_K=64, PROGRAMS=384, warps=4, stages=3, up_to=64),
        tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, PROGRAMS=256, warps=8, stages=3, up_to=256),
        tile(),  # from here on, decoded first
    ),
    "int8_gemm": (
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, warps=4, stages=5, up_to=64),
        # Two programs to a multiprocessor: one multiplies while the other waits.
        tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=128, GROUP_T=8, warps=8, stages=3, up_to=1024),
        tile(BLOCK_T=128, BLOCK_N=256, BLOCK_K=128, GROUP_T=8, warps=8, stages=4),
    ),
    "gemm_int8_weight": (
        tile(BLOCK_T=64, BLOCK_N=64, BLOCK_K=128, GROUP_T=8, warps=4, stages=4, up_to=64),
        # Two programs to a multiprocessor: one decodes while the other multiplies.
        tile(BLOCK_T=128, BLOCK_N=128, BLOCK_K=64, GROUP_T=8, warps=8, stages=4),
    ),
    # A tile of keys is on its way while another is multiplied: the block table is read before, which takes two stages of each load's.
    "decode_attention": (
        tile(BLOCK_M=32, BLOCK_N=64, stages=5, up_to=128),
        tile(BLOCK_M=32, BLOCK_N=64, warps=8, stages=5),
    ),
    "decode_attention_codes": (
        tile(BLOCK_M=32, BLOCK_N=128, warps=8, stages=3, up_to=128),
        tile(BLOCK_M=32, BLOCK_N=64, warps=4, stages=3),
    ),
    "prefill_attention": (
        tile(BLOCK_M=128, BLOCK_N=128, warps=8, stages=3, up_to=128),
        tile(BLOCK_M=128, BLOCK_N=64, warps=8, stages=3),
    ),
    "prefill_attention_codes": (
        tile(BLOCK_M=128, BLOCK_N=64, warps=8, stages=3, up_to=128),
        tile(BLOCK_M=128, BLOCK_N=32, warps=8, stages=2),
    ),
    "prefill_attention_float32": (
        tile(BLOCK_M=32, BLOCK_N=16, up_to=64),
        tile(BLOCK_M=16, BLOCK_N=16, warps=8),
    ),
    "moe_gemm": (
        tile(BLOCK_T=16, BLOCK_N=32, BLOCK_K=128, GROUP_T=8, PROGRAMS=528, warps=4, stages=4, up_to=12),
        tile(BLOCK_T=64, BLOCK_N=128, BLOCK_K=64, GROUP_T=8, PROGRAMS=264, warps=4, stages=4, up_to=64),
        tile(BLOCK_T=128, BLOCK_N=256, BLOCK_K=64, GROUP_T=8, PROGRAMS=1, warps=8, stages=4),
    ),
    "moe_gemm_codes": _MOE_CODES,
    "moe_gemm_4bit": _MOE_CODES,
}
