"""The tiles of NVIDIA's architectures, where the portable ones aren't best. A new architecture is a new entry."""

from __future__ import annotations

from q_triton.tiles import Table, register, tile

TILES: dict[str, Table] = {
    "sm_80": {
        "decode_attention": (tile(BLOCK_M=32, BLOCK_N=64, stages=3, up_to=128), tile(BLOCK_M=32, BLOCK_N=32, stages=3)),
        "decode_attention_codes": (
            tile(BLOCK_M=32, BLOCK_N=128, warps=8, stages=3, up_to=128),
            tile(BLOCK_M=32, BLOCK_N=64, warps=8, stages=3),
        ),
        "prefill_attention": (
            tile(BLOCK_M=128, BLOCK_N=64, warps=8, stages=3, up_to=128),
            tile(BLOCK_M=64, BLOCK_N=64, warps=8, stages=2),
        ),
        "prefill_attention_codes": (
            tile(BLOCK_M=64, BLOCK_N=64, warps=8, stages=2, up_to=128),
            tile(BLOCK_M=64, BLOCK_N=32, warps=8, stages=2),
        ),
    },
    # A tile of keys is on its way while another is multiplied: the block table is read before, which takes two stages of each load's.
    "sm_90": {
        "decode_attention": (
            tile(BLOCK_M=32, BLOCK_N=64, stages=5, up_to=128),
            tile(BLOCK_M=32, BLOCK_N=64, warps=8, stages=5),
        ),
        "decode_attention_codes": (
            tile(BLOCK_M=32, BLOCK_N=128, warps=8, stages=3, up_to=128),
            tile(BLOCK_M=32, BLOCK_N=64, warps=8, stages=3),
        ),
        "prefill_attention": (
            tile(BLOCK_M=128, BLOCK_N=128, warps=8, stages=3, up_to=128),
            tile(BLOCK_M=128, BLOCK_N=64, warps=8, stages=3),
        ),
        "prefill_attention_codes": (
            tile(BLOCK_M=128, BLOCK_N=64, warps=8, stages=3, up_to=128),
            tile(BLOCK_M=64, BLOCK_N=64, warps=8, stages=2),
        ),
    },
}

register(TILES)
