"""What one measurement says."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.case import Case
from benchmarks.clock import SECONDS, Yardstick, milliseconds


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
        met: whether it is reached; ``None`` where nothing is asked for.
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


def measure(case: Case, threads: int, yardstick: Yardstick) -> Record:
    """Measure a case with the threads that torch has now; a fraction of a bound is asked for at one thread only."""
    seconds = SECONDS if case.seconds is None else case.seconds
    times = milliseconds({"ours": case.ours, **case.peers}, case.sets, seconds)
    ours = times.pop("ours")
    rivals = {name: ms for name, ms in times.items() if not case.target.peers or name in case.target.peers}
    peer = min(rivals, key=rivals.__getitem__) if rivals else None
    ratio = rivals[peer] / ours if peer is not None else None
    fraction = yardstick.fraction(case.work, ours) if case.work else None

    wanted_ratio = case.target.ratio
    if threads > 1 and case.target.ratio_of_all is not None:
        wanted_ratio = case.target.ratio_of_all
    checks = []
    if wanted_ratio is not None and ratio is not None:
        checks.append(ratio >= wanted_ratio)
    if case.target.fraction is not None and fraction is not None and threads == 1:
        checks.append(fraction >= case.target.fraction)
    return Record(
        op=case.op, shape=case.shape, dtype=case.dtype, threads=threads, ours_ms=ours,
        peer=peer, peer_ms=rivals[peer] if peer is not None else None, peers_ms=times, ratio=ratio,
        bound=case.work.bound if case.work else None, bound_fraction=fraction,
        target=str(case.target), met=all(checks) if checks else None,
    )  # fmt: skip
