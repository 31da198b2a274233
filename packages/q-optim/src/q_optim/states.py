"""The states of parameters: made where they are to be, and updated there, on this process's share or on the whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from q_optim import shards
from q_optim.arguments import Paging
from q_optim.paging import InMemory, Placement, paged_placement
from q_optim.segment import Segment
from q_optim.storage import Part, Storage
from q_optim.update import Update


def held_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a parameter's state."""
    return {key: held for key, held in state.items() if key != "step"}


class StatePlaces:
    """Where the states of an optimizer's parameters are: one placement a device."""

    def __init__(self, paging: Paging | None) -> None:
        self._paging = paging
        self._placements: dict[torch.device, Placement] = {}

    def make(self, wanted: Iterable[tuple[Tensor, Part]]) -> list[tuple[Tensor, Part, Tensor]]:
        """New tensors of these parameters' states, all or none, sharded as the parameters are."""
        by_device: dict[torch.device, list[tuple[Tensor, Part]]] = defaultdict(list)
        for param, part in wanted:
            by_device[param.device].append((param, part))
        made = []
        for device, parts in by_device.items():
            shares = [replace(part, shape=shards.local_shape(param, part.shape)) for param, part in parts]
            for (param, part), tensor in zip(parts, self._placement(device).make(shares), strict=True):
                made.append((param, part, shards.like(param, tensor, part.shape)))
        return made

    def run(self, update: Update, segments: Sequence[Segment], storage: Storage) -> None:
        """Update parameters that are alike, each given as one segment, with its tensors as they are held."""
        if update.whole and any(shards.is_sharded(segment.param) for segment in segments):
            for segment in segments:
                _run_gathered(update, segment, storage)
            return
        shares = [_share(segment) for segment in segments]
        self._placement(segments[0].param.device).run(update, shares, storage)
        for segment, updated in zip(segments, shares, strict=True):
            if not shards.local(segment.param).is_contiguous():
                shards.local(segment.param).copy_(updated.param)

    def _placement(self, device: torch.device) -> Placement:
        if device not in self._placements:
            self._placements[device] = InMemory(device) if self._paging is None else paged_placement(device, *self._paging)
        return self._placements[device]


def _share(segment: Segment) -> Segment:
    """What this process holds of a parameter, contiguous."""
    if segment.param.is_contiguous() and not shards.is_distributed(segment.param) and not shards.is_distributed(segment.grad):
        return segment
    return replace(
        segment,
        # The ops walk memory flat, so a parameter that isn't contiguous (channels_last, say) is updated in a copy.
        param=shards.local(segment.param).contiguous(),
        grad=shards.share(segment.param, segment.grad),
        states={key: shards.local(held) for key, held in segment.states.items()},
    )


def _run_gathered(update: Update, segment: Segment, storage: Storage) -> None:
    """A sharded parameter whose update wants it whole: every process updates all of it, and keeps its share."""
    whole = replace(
        segment,
        param=shards.whole(segment.param),
        grad=shards.whole(segment.grad),
        states={key: shards.whole(held) for key, held in segment.states.items()},
    )
    update([whole], storage)
    shards.keep_share(segment.param, whole.param)
    for key, held in segment.states.items():
        shards.keep_share(held, whole.states[key])
