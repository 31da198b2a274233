"""Tensors that end, or begin, at a page which no one may read or write: an overrun ends the process with a segmentation fault.

For backends whose kernels take a process's own memory, on POSIX systems.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from q_core.testing.agreement import map_call
from q_core.testing.calls import Call
from q_core.testing.target import Target

PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class GuardedRegion:
    """Memory between two forbidden pages, for one tensor at a time.

    Args:
        room: bytes, rounded up to whole pages.
    """

    def __init__(self, room: int) -> None:
        self._room = -(-room // PAGE) * PAGE
        self._memory = mmap.mmap(-1, self._room + 2 * PAGE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + PAGE
        for page in (self._start - PAGE, self._start + self._room):
            if _libc.mprotect(page, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, tensor: Tensor, offset: int | None) -> Tensor:
        """A copy of the same strides that begins ``offset`` elements after the first page, or with ``None`` ends at the last.

        The region has to outlive it.
        """
        if tensor.numel() == 0:
            return tensor
        # From the first element to the last: between them may lie others, or the same ones again.
        span = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = span * tensor.element_size()
        begin = self._room - size if offset is None else offset * tensor.element_size()
        assert 0 <= begin <= self._room - size
        placed = torch.frombuffer((ctypes.c_char * size).from_address(self._start + begin), dtype=tensor.dtype)
        placed.copy_(tensor.as_strided((span,), (1,)))
        return placed.as_strided(tensor.shape, tensor.stride())


class Guarded:
    """Places tensors, each in a region of its own; they are valid as long as it is.

    Args:
        at_end: they end at a forbidden page; otherwise they begin after one.
    """

    def __init__(self, *, at_end: bool) -> None:
        self._offset = None if at_end else 0
        self._regions: list[GuardedRegion] = []

    def place(self, tensor: Tensor) -> Tensor:
        region = GuardedRegion(tensor.element_size() * (1 + sum(n * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))))
        self._regions.append(region)
        return region.place(tensor, self._offset)


def run_guarded(target: Target, call: Call, guarded: Guarded) -> None:
    """Run an op under test on arguments that no one may read or write beyond."""
    target.run(map_call(guarded.place, call))
