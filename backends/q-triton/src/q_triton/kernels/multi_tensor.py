"""One launch for several tensors: each program works on one of them.

A launch takes tuples, an entry a tensor: its memory, its first program, its number of elements. So no table of addresses is copied to the
device, and a launch can be captured in a graph.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def entry(entries, program, starts):
    """Of a tuple the entry of the tensor that a program works on: the last one whose first program, in ``starts``, isn't after it."""
    chosen = entries[0]
    for i in tl.static_range(1, len(entries)):
        chosen = tl.where(program >= starts[i], entries[i], chosen)
    return chosen


@triton.jit
def place(program, starts):
    """The index of that tensor."""
    chosen = 0
    for i in tl.static_range(1, len(starts)):
        chosen += (program >= starts[i]).to(tl.int32)
    return chosen


@triton.jit
def span(program, starts, units, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The first of the BLOCK elements that a program works on, and how many there are; the tensor has UNIT times its ``units``.

    That the compiler knows so of what power of two the count is a multiple lets it load vectors under a mask.
    """
    tile = program - entry(starts, program, starts)
    first = tile.to(tl.int64) * BLOCK
    left = entry(units, program, starts).to(tl.int64) * UNIT - first
    return tile, first, tl.minimum(left, BLOCK).to(tl.int32)
