"""What one measurement says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from benchmarks.case import Call, Case, Target, Work
from benchmarks.clock import SECONDS, milliseconds

Clock = Callable[[Mapping[str, Call], int, float], dict[str, float]]
"""Median milliseconds of contenders on so many sets of inputs, in about so many seconds each."""


class Bandwidths(Protocol):
    """The machine's, such as :class:`benchmarks.clock.Yardstick`."""

    def fraction(self, work: Work, ms: float) -> float:
        """Share of the bound that a time reaches."""


@dataclass(frozen=True, slots=True)
class Record:
    """A case at a number of threads.

    Attributes:
        op, shape, dtype: the case.
        threads: torch's.
        ours_ms: median time.
        peer: the fastest of those that the target names; ``None`` where the case has none.
        peer_ms: its median time.
        peers_ms: the median time of every peer, whether or not a target names it.
        ratio: its time over ours: above 1 we are the faster.
        bound: what limits the op on this machine: "read" or "copy" bandwidth, as measured in this run.
        bound_fraction: share of it that we reach.
        target: what is asked for, in words.
        met: whether it is reached, by a result that is right; ``None`` where nothing is asked for.
        rate: bytes or operations of the work a second.
        error: of the result, as :class:`benchmarks.case.Check` has it.
        stretch: what is hoped for, in words.
        stretched: whether that is reached.
    """

    op: str
    shape: str
    dtype: str
    threads: int
    ours_ms: float
    peer: str | None
    peer_ms: float | None
    peers_ms: dict[str, float]
    ratio: float | None
    bound: str | None
    bound_fraction: float | None
    target: str
    met: bool | None
    rate: float | None
    error: float | None
    stretch: str
    stretched: bool | None


def measure(case: Case, threads: int, yardstick: Bandwidths, clock: Clock = milliseconds) -> Record:
    """Measure a case with the threads that torch has now; a fraction of a bound is asked for at one thread only."""
    error = None if case.check is None else case.check.error()
    right = case.check is None or case.check.allowed >= (error or 0.0)
    seconds = SECONDS if case.seconds is None else case.seconds
    times = clock({"ours": case.ours, **case.peers}, case.sets, seconds)
    ours = times.pop("ours")
    rivals = {name: ms for name, ms in times.items() if not case.target.peers or name in case.target.peers}
    peer = min(rivals, key=rivals.__getitem__) if rivals else None
    ratio = rivals[peer] / ours if peer is not None else None
    fraction = yardstick.fraction(case.work, ours) if case.work else None
    rate = case.work.amount / (ours / 1e3) if case.work else None

    def reaches(target: Target) -> bool | None:
        wanted_ratio = target.ratio
        if threads > 1 and target.ratio_of_all is not None:
            wanted_ratio = target.ratio_of_all
        checks = [times[name] / ours >= wanted for name, wanted in target.ratios.items() if name in times]
        if wanted_ratio is not None and ratio is not None:
            checks.append(ratio >= wanted_ratio)
        if target.fraction is not None and fraction is not None and threads == 1:
            checks.append(fraction >= target.fraction)
        if target.rate is not None and rate is not None:
            checks.append(rate >= target.rate)
        return all(checks) if checks else None

    return Record(
        op=case.op, shape=case.shape, dtype=case.dtype, threads=threads, ours_ms=ours,
        peer=peer, peer_ms=rivals[peer] if peer is not None else None, peers_ms=times, ratio=ratio,
        bound=case.work.bound if case.work else None, bound_fraction=fraction,
        target=str(case.target), met=reaches(case.target) if right else False,
        rate=rate, error=error, stretch=str(case.stretch), stretched=reaches(case.stretch) if right else None,
    )  # fmt: skip
