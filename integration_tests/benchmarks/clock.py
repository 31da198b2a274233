"""Taking times on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from benchmarks.case import Call, Work

ROUNDS = 25
SECONDS = 1.5
"""A contender gets ROUNDS turns, or as many as fit in these SECONDS, or those given, and at least three."""

YARDSTICK_BYTES = 256 * 2**20


def milliseconds(contenders: Mapping[str, Call], sets: int, seconds: float = SECONDS) -> dict[str, float]:
    """Median time of each contender.

    They take turns, so that what slows the machine down slows all of them down, each on other inputs than the one before, so that none
    finds its own in cache.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call(0)
    apart = max(1, sets // len(contenders))
    for turn in range(ROUNDS):
        for place, (name, call) in enumerate(contenders.items()):
            taken = times[name]
            if len(taken) >= 3 and sum(taken) > seconds:
                continue
            start = time.perf_counter()
            call((turn + place * apart) % sets)
            taken.append(time.perf_counter() - start)
    return {name: statistics.median(taken) * 1e3 for name, taken in times.items()}


class Yardstick:
    """The machine's bandwidth at the number of threads that torch has now, bytes a second."""

    def __init__(self) -> None:
        source = torch.zeros(YARDSTICK_BYTES // 4)
        target = torch.zeros_like(source)
        best = milliseconds({"read": lambda _: source.sum(), "dot": lambda _: torch.dot(source, target)}, 1)
        self.read = max(source.nbytes / best["read"], 2 * source.nbytes / best["dot"]) * 1e3
        self.copy = 2 * source.nbytes / milliseconds({"copy": lambda _: target.copy_(source)}, 1)["copy"] * 1e3

    def fraction(self, work: Work, ms: float) -> float:
        """Share of the bound that a time reaches."""
        rate: float = getattr(self, work.bound)
        return work.amount / rate / (ms / 1e3)
