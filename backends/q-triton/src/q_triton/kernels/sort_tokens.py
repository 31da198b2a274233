"""Which tokens an expert works on. P pairs of a token and an expert, in the order of ``topk_ids``; E experts.

A tile is up to BLOCK_T pairs of one expert. An expert's pairs keep their order, so the same call gives the same tiles. A pair whose id is
none of 0…E-1 is in no tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["P"])
def sort_pairs_kernel(ids, order, starts, P, E, BLOCK_P: tl.constexpr):
    """The pairs of one expert, written to ``order`` behind those of the experts before it; ``starts`` [E + 1] says where they begin.

    The ids are read twice: what comes before is counted, then each own pair takes the next place. No program waits for another.
    """
    expert = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_P)
    before = tl.zeros((BLOCK_P,), tl.int32)
    for first in range(0, P, BLOCK_P):
        id = tl.load(ids + first + lanes, first + lanes < P, -1)
        before += ((id >= 0) & (id < expert)).to(tl.int32)
    place = tl.sum(before, 0)
    tl.store(starts + expert, place)
    for first in range(0, P, BLOCK_P):
        own = (tl.load(ids + first + lanes, first + lanes < P, -1) == expert).to(tl.int32)
        tl.store(order + place + tl.cumsum(own, 0) - 1, first + lanes, own > 0)
        place += tl.sum(own, 0)
    tl.store(starts + E, place, expert == E - 1)


@triton.jit
def sorted_tile(tile, order, starts, E, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """The expert of a tile and its pairs, -1 where there is none.

    An expert's tiles are numbered from ``starts[e] // BLOCK_T + e`` on: room enough for all, found without a table of tiles, at the cost
    of at most one number an expert that is nobody's.
    """
    experts = tl.arange(0, BLOCK_E)
    starts_E = tl.load(starts + experts, experts < E, 0)
    expert = tl.sum(((experts < E) & (starts_E // BLOCK_T + experts <= tile)).to(tl.int32), 0) - 1
    start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    places = start + (tile - (start // BLOCK_T + expert)) * BLOCK_T + tl.arange(0, BLOCK_T)
    return expert, tl.load(order + places, places < end, -1)


@triton.jit
def unsorted_tile(tile, ids, P, E, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """The same from the ids themselves where P is at most BLOCK_P, which spares few tokens a kernel that sorts them.

    A tile has a pair's number: that of the first of its pairs.
    """
    pairs = tl.arange(0, BLOCK_P)
    expert = tl.load(ids + tile)
    own = (tl.load(ids + pairs, pairs < P, -1) == expert).to(tl.int32)
    rank = tl.where(own > 0, tl.cumsum(own, 0) - 1, -1)
    first = tl.sum(tl.where(pairs < tile, own, 0), 0)
    is_first = (expert >= 0) & (expert < E) & (first % BLOCK_T == 0)
    places = tl.where(is_first, first, BLOCK_P) + tl.arange(0, BLOCK_T)
    return expert, tl.max(tl.where(rank[None, :] == places[:, None], pairs[None, :], -1), 1)
