"""Where states are: in the device's memory, or, paged, outside of it but for a budget.

On a CPU, paged states are in a file that is mapped into memory: the system writes back and drops pages as it needs room. For an
accelerator they are in pinned host memory, and are copied to the device and back while other parameters are updated.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from q_optim.segment import Segment, batches
from q_optim.storage import Part, Storage
from q_optim.update import Update

_ALIGNMENT = 64
_UNDER_WAY = 4
"""Batches that half the budget must hold: the one before, which is written back, the present one, the next one, and one to spare."""


class Placement(Protocol):
    """Where the states of a device's parameters are."""

    def make(self, parts: Sequence[Part]) -> list[Tensor]:
        """New tensors, as they are before the first step."""

    def run(self, update: Update, segments: Sequence[Segment], storage: Storage) -> None:
        """Update segments whose states are tensors from here."""


class InMemory:
    """In the device's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def make(self, parts: Sequence[Part]) -> list[Tensor]:
        return [torch.full(part.shape, part.fill, dtype=part.dtype, device=self._device) for part in parts]

    def run(self, update: Update, segments: Sequence[Segment], storage: Storage) -> None:
        update(segments, storage)


def paged_placement(device: torch.device, budget: int, directory: str | Path | None) -> Placement:
    """The paged placement for a device.

    Raises:
        ValueError: a directory is given, but the device has memory of its own, so that states go to the host's.
    """
    if device.type == "cpu":
        return InFile(budget, directory)
    if directory is not None:
        raise ValueError(
            f"paged_directory is {str(directory)!r}, but states of parameters on {device} are paged to host memory; leave it out"
        )
    return InHostMemory(device, budget)


def _nbytes(part: Part) -> int:
    return part.shape.numel() * part.dtype.itemsize


class _Budget:
    """Half for states that stay where the parameters are, first come first served; half for those under way."""

    def __init__(self, total: int) -> None:
        self._room = total // 2
        self.under_way = total - self._room

    def admits(self, part: Part) -> bool:
        if _nbytes(part) > self._room:
            return False
        self._room -= _nbytes(part)
        return True

    def batches(self, segments: Sequence[Segment], *, whole: bool) -> list[list[Segment]]:
        """Segments in the lists that are under way together."""
        elements = sum(segment.param.numel() for segment in segments)
        size = sum(segment.state_bytes for segment in segments)
        return list(batches(segments, self.under_way // _UNDER_WAY * elements // max(size, 1), whole=whole))


class _MappedFile:
    """A file without a name, mapped into memory; it vanishes with the process, however that ends."""

    def __init__(self, size: int, directory: str | Path | None) -> None:
        with tempfile.TemporaryFile(dir=directory) as file:
            try:
                # A hole in a file on a full disk would kill the process when it's first written to.
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                where = directory or tempfile.gettempdir()
                raise OSError(error.errno, f"paged states need {size:,} bytes in {where}: {error.strerror}") from error
            self._map = mmap.mmap(file.fileno(), size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._used = 0

    def take(self, part: Part) -> Tensor:
        """The next bytes, as a tensor."""
        first, size = self._used, _nbytes(part)
        self._used = _aligned(first + size)
        # Each tensor has a storage of its own, so that it's saved alone, and beside others of another dtype.
        tensor = torch.frombuffer(self._map, dtype=part.dtype, count=part.shape.numel(), offset=first)
        return tensor.view(part.shape).fill_(part.fill)

    def advise(self, tensor: Tensor, advice: int) -> bool:
        """Say what will become of a tensor's pages, if it is in this file; pages that others share are spared where they are dropped."""
        first = tensor.data_ptr() - self._bytes.data_ptr()
        if not 0 <= first < self._bytes.numel():
            return False
        last = first + tensor.nbytes
        if advice == mmap.MADV_DONTNEED:
            begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        else:
            begin, end = first // mmap.PAGESIZE * mmap.PAGESIZE, last
        if end > begin:
            self._map.madvise(advice, begin, end - begin)
        return True


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class InFile:
    """In memory as far as the budget goes, the rest in files; what comes next is read ahead, what is done with is let go."""

    def __init__(self, budget: int, directory: str | Path | None) -> None:
        self._budget = _Budget(budget)
        self._directory = directory
        self._files: list[_MappedFile] = []

    def make(self, parts: Sequence[Part]) -> list[Tensor]:
        resident = [self._budget.admits(part) for part in parts]
        size = sum(_aligned(_nbytes(part)) for part, stays in zip(parts, resident, strict=True) if not stays)
        if size:
            self._files.append(_MappedFile(size, self._directory))
        tensors = []
        for part, stays in zip(parts, resident, strict=True):
            if stays or not _nbytes(part):
                tensors.append(torch.full(part.shape, part.fill, dtype=part.dtype))
            else:
                tensors.append(self._files[-1].take(part))
                self._advise([tensors[-1]], mmap.MADV_DONTNEED)
        return tensors

    def run(self, update: Update, segments: Sequence[Segment], storage: Storage) -> None:
        lists = self._budget.batches(segments, whole=update.whole)
        for batch, following in zip(lists, [*lists[1:], []], strict=True):
            for segment in following:
                self._advise(segment.states.values(), mmap.MADV_WILLNEED)
            update(batch, storage)
            for segment in batch:
                self._advise(segment.states.values(), mmap.MADV_DONTNEED)

    def _advise(self, tensors: Iterable[Tensor], advice: int) -> None:
        for tensor in tensors:
            any(file.advise(tensor, advice) for file in self._files)


class InHostMemory:
    """On the device as far as the budget goes, the rest in host memory, pinned so that copies run beside the updates.

    Three streams work at a time: one copies the next batch to the device, the caller's updates the present one, and one copies the one
    before back to the host.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self._device = device
        self._budget = _Budget(budget)
        # A CPU has no streams to copy in: tests page from its memory to its memory.
        self._inward, self._outward = (torch.Stream(device=device) if device.type != "cpu" else None for _ in range(2))
        self._on_host: set[int] = set()

    def make(self, parts: Sequence[Part]) -> list[Tensor]:
        return [self._resident(part) if self._budget.admits(part) else self._paged(part) for part in parts]

    def _resident(self, part: Part) -> Tensor:
        return torch.full(part.shape, part.fill, dtype=part.dtype, device=self._device)

    def _paged(self, part: Part) -> Tensor:
        tensor = torch.full(part.shape, part.fill, dtype=part.dtype, pin_memory=self._inward is not None)
        self._on_host.add(_memory(tensor))
        return tensor

    def run(self, update: Update, segments: Sequence[Segment], storage: Storage) -> None:
        lists = self._budget.batches(segments, whole=update.whole)
        leaving: deque[tuple[list[Segment], torch.Event | None]] = deque()
        try:
            fetched = self._fetch(lists[0]) if lists else None
            for batch, following in zip(lists, [*lists[1:], []], strict=True):
                assert fetched is not None
                present, arrival = fetched
                if len(leaving) > 1:
                    self._release(*leaving.popleft())
                fetched = self._fetch(following)
                if arrival is not None:
                    torch.accelerator.current_stream(self._device).wait_event(arrival)
                update(present, storage)
                leaving.append((present, self._write_back(present, batch)))
        finally:
            if self._inward is not None and self._outward is not None:
                # Should an update have failed, what it reads may not be overwritten by the next step's.
                self._inward.wait_stream(torch.accelerator.current_stream(self._device))
                self._outward.synchronize()  # host memory holds the states now, for whoever reads them

    def _fetch(self, segments: Sequence[Segment]) -> tuple[list[Segment], torch.Event | None]:
        """The segments with their states on the device, and when those are there."""
        with self._inward or contextlib.nullcontext():
            fetched = [
                replace(segment, states={key: self._on_device(held) for key, held in segment.states.items()})
                for segment in segments
            ]
        return fetched, self._inward.record_event() if self._inward is not None else None

    def _on_device(self, held: Tensor) -> Tensor:
        return held.to(self._device, non_blocking=True, copy=True) if _memory(held) in self._on_host else held

    def _write_back(self, computed: Sequence[Segment], segments: Sequence[Segment]) -> torch.Event | None:
        """Copy the states to where they are kept; when that's done."""
        if self._outward is not None:
            self._outward.wait_stream(torch.accelerator.current_stream(self._device))
        with self._outward or contextlib.nullcontext():
            for here, there in zip(computed, segments, strict=True):
                for key, held in there.states.items():
                    if held is not here.states[key]:
                        held.copy_(here.states[key], non_blocking=True)
        return self._outward.record_event() if self._outward is not None else None

    def _release(self, segments: Sequence[Segment], written: torch.Event | None) -> None:
        """Give up the device's memory of segments, for the next batch: the caller holds no other reference to them.

        It is the inward stream's, which waits until they are written, and so may take it again at once, however far the host is ahead of
        the device. Were it marked as used by the other streams, it would be free only when the host sees those done, and a host that is
        ahead would take more and more memory, beyond any budget.
        """
        if self._inward is not None and written is not None:
            self._inward.wait_event(written)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
