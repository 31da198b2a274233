"""In which order programs work on the tiles of a matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped(program, rows, columns, GROUP: tl.constexpr):
    """The row and column of a program's tile, of a matrix of ``rows`` by ``columns`` tiles.

    Programs that run side by side take GROUP rows of tiles, column after column: what they read of both operands is then in the
    cache more often than if they took one row after another.
    """
    size = GROUP * columns
    first = program // size * GROUP
    height = tl.minimum(rows - first, GROUP)
    place = program % size
    return first + place % height, place // height
