"""The memory that a piece of code takes at most: a training step, say.

On an accelerator it is what torch's allocator there has handed out. On the CPU, where torch counts nothing, it is what the operating system
says of the process: Linux keeps the most that was resident, and lets a process start that count anew.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_PEAK = "5"
"""What to write into clear_refs to start the peak anew (proc_pid_clear_refs(5))."""


@dataclass(slots=True)
class PeakMemory:
    """What :func:`measure_peak` measures; ``peak_bytes`` is there when its body has ended.

    Attributes:
        counts: what is counted, in words.
        before_bytes: held when it began.
        peak_bytes: the most that was held at once, ``before_bytes`` included.
    """

    counts: str
    before_bytes: int
    peak_bytes: int | None = None

    @property
    def added_bytes(self) -> int:
        """The peak over what was held before.

        Raises:
            RuntimeError: the measurement isn't over.
        """
        if self.peak_bytes is None:
            raise RuntimeError("measure_peak: the peak is known when the with statement has ended; ask for it after that")
        return self.peak_bytes - self.before_bytes

    def __str__(self) -> str:
        if self.peak_bytes is None:
            return f"{self.before_bytes:,} bytes so far ({self.counts})"
        return f"{self.peak_bytes:,} bytes at most, {self.added_bytes:,} more than before ({self.counts})"


@contextmanager
def measure_peak(device: torch.device | str | None = None) -> Iterator[PeakMemory]:
    """Measure the most memory that the body holds at once.

    ::

        with measure_peak() as memory:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        print(memory)

    On the CPU everything in the process counts, other threads and the interpreter too, and of files that it maps what was read. What was
    freed is given back to the system before, so that what takes its place counts again. Measurements on one device can't be nested.

    Args:
        device: an accelerator, or "cpu"; by default the current accelerator if there is one.

    Raises:
        ValueError: the device is neither the CPU nor of the accelerator here.
        RuntimeError: it is the CPU and not Linux, which alone can start the count anew.
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    wanted = torch.device(device) if device is not None else here or torch.device("cpu")
    gc.collect()
    if here is not None and wanted.type == here.type:
        torch.accelerator.synchronize(wanted)
        torch.accelerator.reset_peak_memory_stats(wanted)
        memory = PeakMemory(f"what torch's allocator holds on {wanted}", torch.accelerator.memory_allocated(wanted))
        try:
            yield memory
        finally:
            torch.accelerator.synchronize(wanted)
            memory.peak_bytes = torch.accelerator.max_memory_allocated(wanted)
        return
    if wanted.type != torch.device("cpu").type:
        raise ValueError(
            f"measure_peak: device is {wanted}, expected 'cpu' or the accelerator here, {here or 'of which there is none'}"
        )
    _give_back()
    _start_anew()
    memory = PeakMemory("what of the process is resident, as Linux says", _resident("VmRSS"))
    try:
        yield memory
    finally:
        memory.peak_bytes = _resident("VmHWM")


def _start_anew() -> None:
    try:
        _CLEAR.write_text(_PEAK)
    except OSError as error:
        raise RuntimeError(
            f"measure_peak: the CPU's peak is measured on Linux alone, with {_CLEAR}, and that failed: {error}"
        ) from error


def _give_back() -> None:
    with suppress(OSError, AttributeError):  # glibc has it, other libraries give memory back by themselves, or not at all
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
