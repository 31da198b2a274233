"""Tables in which a kernel finds the nearest code of a 4-bit type with one look."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS

BUCKETS = 64


def _buckets(x: Tensor) -> Tensor:
    """The bucket that each x belongs to, by the operations of :func:`q_triton.kernels.search.encode_4bit`.

    They are monotone. So a midpoint in a lower bucket is below x and one in a higher bucket above it, however x + 6 was rounded.
    """
    return ((x + 6.0).view(torch.int32) >> 17) - 0x2040


@functools.cache
def four_bit_table(quant_type: str, device: torch.device) -> Tensor:
    """int64 [64] on a device: the bits of the midpoint in a bucket, or of infinity; from bit 32 the code below; from bit 40 that above.

    Shared, not to be written to.
    """
    book = FOUR_BIT_BOOKS[quant_type]
    with torch.inference_mode(False), torch.device("cpu"):  # whatever the default device is
        codes = torch.tensor(book.ordered)
        values = torch.tensor(book.values)[codes]
        midpoints = (values[:-1] + values[1:]) / 2
        buckets = _buckets(midpoints)
        assert buckets.unique().numel() == buckets.numel(), f"two midpoints of {quant_type} share a bucket"
        inside = torch.full((BUCKETS,), torch.inf).index_copy(0, buckets.long(), midpoints)
        below = torch.bucketize(torch.arange(BUCKETS), buckets)
        above = (below + 1).clamp(max=len(codes) - 1)
        table = inside.view(torch.int32).long() & 0xFFFFFFFF | codes[below] << 32 | codes[above] << 40
        return table.to(device)
