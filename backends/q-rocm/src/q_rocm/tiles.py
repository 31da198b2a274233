"""The tiles of AMD's architectures, where the portable ones aren't best. A new architecture is a new entry."""

from __future__ import annotations

from q_triton.tiles import Table, register, tile

CDNA: Table = {
    "decode_attention": (tile(BLOCK_M=32, BLOCK_N=64, stages=2, up_to=128), tile(BLOCK_M=32, BLOCK_N=32, stages=2)),
    "decode_attention_codes": (tile(BLOCK_M=32, BLOCK_N=32, stages=2),),
    "decode_attention_float32": (tile(BLOCK_M=16, BLOCK_N=32, stages=2, up_to=128), tile(BLOCK_M=16, BLOCK_N=16)),
    "prefill_attention": (tile(BLOCK_M=64, BLOCK_N=64, stages=2, up_to=128), tile(BLOCK_M=64, BLOCK_N=32)),
    "prefill_attention_codes": (tile(BLOCK_M=64, BLOCK_N=32, up_to=128), tile(BLOCK_M=32, BLOCK_N=32)),
    "prefill_attention_float32": (tile(BLOCK_M=64, BLOCK_N=32, up_to=128), tile(BLOCK_M=32, BLOCK_N=16)),
}
"""Of the Instinct family, which has more registers and wider matrix instructions than other GPUs of AMD's."""

TILES: dict[str, Table] = {
    "gfx90a": CDNA,
    "gfx942": CDNA,
    "gfx1100": {},
}

register(TILES)
