"""Taking times on an accelerator: by its own events, of replayed graphs, on inputs that don't fit into its caches together."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch

from benchmarks import clock
from benchmarks.case import Call, Work
from gpu.graph import can_capture, captured

WORKING_SET = 256 * 2**20
"""Bytes that inputs take in turn: four times the last-level cache of an H200."""

ROUNDS = 25
MILLISECONDS_A_TURN = 2.0
"""So long is a contender's turn at least, as far as whole rounds over the sets of inputs fill it: far above what an event resolves."""

YARDSTICK_BYTES = 2**31
YARDSTICK_SIDE = 8192


def sets_for(bytes_each: int) -> int:
    """Sets of inputs of a size that fill the working set; two, of those that fill it alone."""
    return max(2, min(64, -(-WORKING_SET // max(1, bytes_each))))


class DeviceClock:
    """Medians of contenders in turns, as :data:`benchmarks.record.Clock` asks for them.

    Args:
        device: an accelerator; a CPU is measured by :func:`benchmarks.clock.milliseconds`.
        launched: contenders that are measured with their launches.
    """

    def __init__(self, device: torch.device, launched: Collection[str] = ()) -> None:
        self._device = device
        self._launched = launched

    def __call__(self, contenders: Mapping[str, Call], sets: int, seconds: float) -> dict[str, float]:
        """Median time of each; a peer that fails is left out, and what it says is printed."""
        if self._device.type == "cpu":
            return clock.milliseconds(contenders, sets, seconds)
        turns = {}
        for name, call in contenders.items():
            try:
                turns[name] = self._turn(call, sets, graph=name not in self._launched)
            except Exception as error:
                if name == "ours":
                    raise
                print(f"{name} isn't measured: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
        times: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(ROUNDS):
            for name, (turn, calls) in turns.items():
                if len(times[name]) < 3 or sum(times[name]) * calls < seconds * 1e3:
                    times[name].append(self._elapsed(turn) / calls)
        return {name: statistics.median(taken) for name, taken in times.items()}

    def _turn(self, call: Call, sets: int, *, graph: bool) -> tuple[Any, int]:
        """What runs a call over all sets of inputs, once or several times, and how many calls that is."""

        def once_over() -> None:
            for i in range(sets):
                call(i)

        once_over()
        alone = self._elapsed(once_over)
        rounds = max(1, min(50, round(MILLISECONDS_A_TURN / alone)))

        def turn() -> None:
            for _ in range(rounds):
                once_over()

        if graph and can_capture(self._device):
            try:
                replay, _ = captured(turn, self._device)
            except RuntimeError as error:
                print(f"measured with its launches, as no graph holds it: {str(error).splitlines()[:1]}", file=sys.stderr)
            else:
                replay()
                return replay, rounds * sets
        return turn, rounds * sets

    def _elapsed(self, turn: Any) -> float:
        """Milliseconds of the device."""
        module: Any = torch.get_device_module(self._device)
        begin, end = (module.Event(enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize(self._device)
        begin.record()
        turn()
        end.record()
        end.synchronize()
        elapsed: float = begin.elapsed_time(end)
        return elapsed


class DeviceYardstick:
    """What a device itself can: bytes a second copied, counting those read and those written, and operations a second of a matrix product.

    Args:
        device: which.
        small: in a moment, and for no figure's sake.
    """

    def __init__(self, device: torch.device, *, small: bool) -> None:
        size, side = (2**20, 64) if small else (YARDSTICK_BYTES, YARDSTICK_SIDE)
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        measure = DeviceClock(device)
        times = measure({"copy": lambda _: target.copy_(source), "matrix": lambda _: a @ b}, 1, clock.SECONDS)
        self.copy = 2 * source.nbytes / times["copy"] * 1e3
        self.read = self.copy
        self.matrix = 2 * side**3 / times["matrix"] * 1e3

    def __str__(self) -> str:
        return f"copy {self.copy / 1e12:.2f} TB/s, bfloat16 product {self.matrix / 1e12:.0f} TFLOP/s"

    def fraction(self, work: Work, ms: float) -> float:
        """Share of the bound that a time reaches."""
        rate: float = getattr(self, work.bound)
        return work.amount / rate / (ms / 1e3)
