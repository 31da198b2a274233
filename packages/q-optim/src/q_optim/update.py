"""One step of an algorithm on segments, and what may go around it: 4-bit states, stochastic rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from q_core import bound, hookspecs
from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import ALL_STATES, RULES, WHOLE_TENSOR_RULES, OptimizerName
from q_optim.segment import Segment, absmax_key, batches
from q_optim.storage import Float32, FourBit, Storage

WORKSPACE = 1 << 20
"""Elements that are held in float32 at a time, where an update needs that beside what is stored."""


class Update(Protocol):
    """One step of an algorithm.

    Attributes:
        states: those that it keeps of state1, state2 and state3.
        whole: it takes norms or products over a whole parameter, which must then be one segment.
    """

    @property
    def states(self) -> tuple[str, ...]: ...
    @property
    def whole(self) -> bool: ...
    def __call__(self, segments: Sequence[Segment], storage: Storage) -> None:
        """Update parameters and states in place."""


_step_8bit = bound(hookspecs.optimizer_step_8bit)
_step_32bit = bound(hookspecs.optimizer_step_32bit)

_SETTINGS: dict[str, Any] = {
    "lr": 0.0,
    "beta1": 0.0,
    "beta2": 0.0,
    "beta3": 0.0,
    "alpha": 0.0,
    "eps": 0.0,
    "weight_decay": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "trust_coefficient": 0.0,
    "step": 0,
}
"""The ops' settings in their order, each as it is where a rule doesn't use it."""


def _keys(storage: Storage) -> tuple[str, ...]:
    """The lists of states that the op takes, in its order."""
    return ALL_STATES if isinstance(storage, Float32) else (*ALL_STATES, *map(absmax_key, ALL_STATES))


def common_settings(group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The op's arguments that every rule has."""
    return {"lr": float(group["lr"]), "weight_decay": group["weight_decay"], "step": step}


@dataclass(frozen=True, slots=True)
class SurfaceUpdate:
    """A rule of the op surface; ``settings`` are the op's arguments, lr and weight_decay and step among them."""

    rule: OptimizerName
    settings: dict[str, Any]

    @property
    def states(self) -> tuple[str, ...]:
        return RULES[self.rule].names(self.settings.get("beta1", 0.0))

    @property
    def whole(self) -> bool:
        return self.rule in WHOLE_TENSOR_RULES

    def __call__(self, segments: Sequence[Segment], storage: Storage) -> None:
        if isinstance(storage, FourBit):
            for batch in batches(segments, WORKSPACE, whole=self.whole):
                self._step_4bit(batch, storage)
            return
        # Bound, without a second check: settings were checked when they were given, states were made here, and torch sees to gradients.
        kept = segments[0].states
        lists: list[Any] = [[segment.states[key] for segment in segments] if key in kept else [] for key in _keys(storage)]
        params, grads = [segment.param for segment in segments], [segment.grad for segment in segments]
        skipped = [segment.skipped for segment in segments]
        arguments: list[Any]
        settings = [self.settings.get(name, neutral) for name, neutral in _SETTINGS.items()]
        if isinstance(storage, Float32):
            arguments = [self.rule, params, grads, *lists, skipped, *settings]
            _step_32bit(*arguments)
        else:
            device = params[0].device
            books = dynamic_map(signed=True, device=device), dynamic_map(signed=False, device=device)
            arguments = [self.rule, params, grads, *lists, skipped, *books, *settings, storage.blocksize]
            _step_8bit(*arguments)

    def _step_4bit(self, segments: Sequence[Segment], storage: FourBit) -> None:
        """The surface's step on states that are decoded for it; a block with a non-finite gradient stays as it is."""
        finite = [_finite_blocks(segment.grad, storage.blocksize) for segment in segments]
        decoded = [
            replace(
                segment,
                grad=torch.where(keep, segment.grad, torch.nan),
                states={state: storage.decode(segment, state) for state in self.states},
            )
            for segment, keep in zip(segments, finite, strict=True)
        ]
        self(decoded, Float32())
        for segment, update, keep in zip(segments, decoded, finite, strict=True):
            for state, value in update.states.items():
                storage.encode(segment, state, value, keep)


@dataclass(frozen=True, slots=True)
class StochasticallyRounded:
    """An update of bfloat16 parameters in float32, which are then rounded up or down at random, so that the mean is right.

    To the nearest, updates below half a unit in the last place would all be lost. The noise is the generator's, on the parameters' device,
    in the order of the elements: it doesn't depend on how many of them one call is given.
    """

    update: Update
    generator: torch.Generator

    @property
    def states(self) -> tuple[str, ...]:
        return self.update.states

    @property
    def whole(self) -> bool:
        return self.update.whole

    def __call__(self, segments: Sequence[Segment], storage: Storage) -> None:
        for batch in batches(segments, WORKSPACE, whole=self.whole):
            wide = [replace(segment, param=segment.param.float(), grad=segment.grad.float()) for segment in batch]
            self.update(wide, storage)
            for segment, updated in zip(batch, wide, strict=True):
                segment.param.copy_(round_stochastically(updated.param, self.generator))


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to one of the two bfloat16 neighbours, the nearer the likelier; what is exact, infinite or NaN stays.

    A bfloat16 is the upper half of a float32: noise below it carries into it as often as its lower half is large.
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _finite_blocks(grad: Tensor, blocksize: int) -> Tensor:
    """For each element, whether all gradients of its block are finite."""
    count = grad.numel()
    padded = torch.nn.functional.pad(grad.isfinite(), (0, -count % blocksize), value=True)
    return padded.view(padded.numel() // blocksize, blocksize).all(1).repeat_interleave(blocksize)[:count]
