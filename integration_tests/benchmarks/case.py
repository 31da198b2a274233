"""What is measured: one op in one shape, its peers, and what its time is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Call = Callable[[int], Any]
"""Runs the thing once, on the i-th of its sets of inputs: taken in turn, so that none is left in cache from the time before."""

Bound = Literal["read", "copy", "matrix"]


@dataclass(frozen=True, slots=True)
class Work:
    """What the hardware must do at least.

    Attributes:
        bound: what limits it: "read" for bytes that are only read, "copy" for bytes read and written, "matrix" for the operations of a
            matrix product in bfloat16.
        amount: how many.
    """

    bound: Bound
    amount: int


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for.

    Attributes:
        ratio: the best peer's time over ours, at least; at one thread and at all.
        ratio_of_all: the same at all threads, where it differs.
        fraction: of the bound, at least, at one thread.
        peers: those that the ratio is against; all, if empty.
        ratios: the time over ours, at least, of peers by name; of one that isn't there, nothing is asked.
        rate: bytes or operations of the work a second, at least.
    """

    ratio: float | None = None
    ratio_of_all: float | None = None
    fraction: float | None = None
    peers: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    rate: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.fraction is not None:
            parts.append(f"{self.fraction:.0%} of the bound")
        if self.rate is not None:
            parts.append(f"{self.rate / 1e12:,.0f} T/s")
        if self.ratio is not None:
            parts.append(f"{self.ratio:.2g}× {' or '.join(self.peers) or 'the best peer'}")
        if self.ratio_of_all is not None:
            parts.append(f"{self.ratio_of_all:.2g}× at all threads")
        parts += [f"{ratio:.2g}× {peer}" for peer, ratio in self.ratios.items()]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Check:
    """Whether a result is right, before its time counts.

    Attributes:
        error: how far it is from float64's, as a share of that's length; of codes, the share of those that differ.
        allowed: the largest error of a right one.
    """

    error: Callable[[], float]
    allowed: float


@dataclass(frozen=True, slots=True)
class Case:
    """An op in a shape.

    Attributes:
        op: name in the surface, with what is special in brackets.
        shape: for people.
        dtype: of the activations or of what is quantized.
        ours: the op through its public function.
        peers: by name.
        sets: how many sets of inputs ``ours`` and the peers take in turn.
        target: what is asked for.
        work: what the hardware must do, if a bound is stated.
        seconds: what a contender's turns may take, where that isn't the clock's default.
        stretch: what is hoped for.
        check: of the first set's result.
        launched: contenders, "ours" or peers, that are measured with their launches even where graphs can be replayed: because they wait
            for the device, or because what they do on the host is what is measured.
    """

    op: str
    shape: str
    dtype: str
    ours: Call
    peers: Mapping[str, Call] = field(default_factory=dict)
    sets: int = 1
    target: Target = Target()
    work: Work | None = None
    seconds: float | None = None
    stretch: Target = Target()
    check: Check | None = None
    launched: tuple[str, ...] = ()
