"""Runs of a parameter's elements: what an update is given, a list of them at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from q_core.formats.codebooks import BLOCKSIZES

ALIGNMENT = max(BLOCKSIZES)
"""Where a parameter may be split: no block of any size straddles such a place."""


def absmax_key(state: str) -> str:
    """The name of the scales of a state."""
    return state.replace("state", "absmax")


@dataclass(slots=True)
class Segment:
    """Elements of a parameter that lie side by side, and what belongs to them: contiguous tensors, of the parameter's shape or flat.

    Attributes:
        shape: of the whole parameter.
        param: the elements.
        grad: their gradients.
        states: the tensors that hold their states, by key.
        skipped: int64 [], counts the elements that a non-finite gradient left as they were.
    """

    shape: torch.Size
    param: Tensor
    grad: Tensor
    states: dict[str, Tensor]
    skipped: Tensor

    @property
    def state_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.states.values())

    def flat(self) -> Segment:
        """The same elements, every tensor flat."""
        states = {key: held.view(-1) for key, held in self.states.items()}
        return replace(self, param=self.param.view(-1), grad=self.grad.reshape(-1), states=states)

    def part(self, first: int, last: int) -> Segment:
        """The elements first…last-1 of a flat segment, ``first`` a multiple of :data:`ALIGNMENT`."""
        numel = self.param.numel()

        def cut(held: Tensor) -> Tensor:
            # Codes of 8 bits and scales are fewer than the elements by a power of two; so many elements go to each.
            each = 1
            while -(-numel // each) > held.numel():
                each *= 2
            return held[first // each : -(-last // each)]

        states = {key: cut(held) for key, held in self.states.items()}
        return replace(self, param=self.param[first:last], grad=self.grad[first:last], states=states)


def batches(segments: Sequence[Segment], elements: int, *, whole: bool = False) -> Iterator[list[Segment]]:
    """The segments, flat, in lists of at most so many elements; longer ones are split, unless they must stay ``whole``."""
    elements = max(elements // ALIGNMENT, 1) * ALIGNMENT
    batch: list[Segment] = []
    room = elements
    for segment in map(Segment.flat, segments):
        numel = segment.param.numel()
        parts = (
            [segment]
            if whole or numel <= elements
            else [segment.part(i, min(i + elements, numel)) for i in range(0, numel, elements)]
        )
        for part in parts:
            if batch and part.param.numel() > room:
                yield batch
                batch, room = [], elements
            batch.append(part)
            room -= part.param.numel()
    if batch:
        yield batch
