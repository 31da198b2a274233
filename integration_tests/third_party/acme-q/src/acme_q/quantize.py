"""Block-wise quantization: a reduction over runs of the flat tensor and a binary search, with no padding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from acme_q.arrays import decline_dtype, float_array, tensor_of
from acme_q.served import counted
from q_core.backend import impl

SMALLEST_NORMAL = np.finfo(np.float32).tiny


def _accepts(A: Tensor) -> str | None:
    return decline_dtype("A", A.dtype)


@impl(accepts=_accepts)
@counted
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize flat blocks of ``A`` to the nearest entries of a code book: codes, absmax."""
    values = float_array(A).reshape(-1)
    starts = np.arange(0, values.size, blocksize)
    # maximum carries a NaN along, so one poisons the scale of its block.
    absmax = np.maximum.reduceat(np.abs(values), starts) if values.size else np.empty(0, np.float32)

    lengths = np.diff(starts, append=values.size)
    per_element = np.repeat(absmax, lengths)
    with np.errstate(all="ignore"):
        scaled = np.where(per_element < SMALLEST_NORMAL, values / per_element, values * (np.float32(1) / per_element))
    scaled[~(np.isfinite(per_element) & (per_element > 0))] = 0
    np.clip(scaled, -1, 1, out=scaled)

    book = float_array(code)
    midpoints = (book[:-1] + book[1:]) / np.float32(2)
    codes = np.searchsorted(midpoints, scaled, side="left")  # as many midpoints lie below: on a tie the lower entry
    return tensor_of(codes.reshape(A.shape), torch.uint8), tensor_of(absmax, torch.float32)
