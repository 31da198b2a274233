"""Every op on arguments that end, or begin, at a page that no one may read or write; an overrun ends the process.

The calls are the conformance suite's: odd, zero and partial sizes, every dtype. What test_overrun.py does for each length of some
kernels, this does for all ops, whatever q_cpu comes to serve.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from q_core.testing.agreement import map_tensors
from q_core.testing.calls import Call
from q_core.testing.capabilities import Capabilities
from q_core.testing.target import chosen, implementations, target_of

pytestmark = pytest.mark.usefixtures("isa")

PAGE = mmap.PAGESIZE
CAPABILITIES = Capabilities(backend="q_cpu", examples=40)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """Copies of tensors in memory of their own, between two forbidden pages."""

    def __init__(self, *, at_end: bool) -> None:
        self._at_end = at_end
        self._memory: list[tuple[mmap.mmap, int]] = []

    def place(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        if size == 0 or not tensor.is_contiguous():
            return tensor
        room = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, room + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + PAGE
        for page in (start - PAGE, start + room):
            if _libc.mprotect(page, PAGE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self._memory.append((memory, start))
        address = start + (room - size if self._at_end else 0)
        placed = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=tensor.dtype).view(tensor.shape)
        return placed.copy_(tensor)

    def release(self) -> None:
        for memory, start in self._memory:
            for page in (start - PAGE, start + len(memory) - 2 * PAGE):
                _libc.mprotect(page, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        self._memory.clear()


@pytest.fixture(autouse=True)
def _q_cpu_serves() -> Iterator[None]:
    with chosen(CAPABILITIES):
        yield


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("op", implementations(CAPABILITIES))
def test_no_op_touches_what_lies_beyond_its_arguments(op: str, at_end: bool) -> None:
    target = target_of(CAPABILITIES, op)

    def run(call: Call) -> None:
        guarded = Guarded(at_end=at_end)
        try:
            target.run({name: map_tensors(guarded.place, value) for name, value in call.items()})
        finally:
            guarded.release()

    target.for_all(run)
    assert target.served, target.reasons()
