"""Calls of the optim family: a step of every rule on a layer's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import ALL_STATES, RULES, SETTINGS
from q_core.record import Arguments
from q_triton.representative.values import BF16, F32, TITLES, Calls, Values

LARGE = ((14336, 4096),)
LAYER = (*LARGE, (4096,), (4096,))
"""With the weights of norms, which are updated together."""
BLOCKSIZE = 256
LONGER_BLOCKS = (1024, 2048, 4096)
VALUES: dict[str, Any] = {
    "beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8, "dampening": 0.0, "nesterov": False,
    "trust_coefficient": 0.01,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """A rule with what differs from the usual."""

    name: str
    shapes: tuple[tuple[int, ...], ...] = LARGE
    dtype: torch.dtype = BF16
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        changes = (f"{setting}={value}" for setting, value in self.changes.items())
        return ", ".join((self.name, f"{len(self.shapes)} tensors", TITLES[self.dtype], *changes))

    @property
    def settings(self) -> dict[str, Any]:
        used = RULES[self.name].settings
        return {name: VALUES[name] if name in used else type(VALUES[name])() for name in SETTINGS} | dict(self.changes)

    @property
    def states(self) -> tuple[str, ...]:
        return RULES[self.name].names(self.settings["beta1"])

    def arguments(self, values: Values) -> Arguments:
        """Those that don't depend on how the states are held."""
        params, grads = ([values.normal(*shape, dtype=self.dtype) for shape in self.shapes] for _ in range(2))
        given = {"name": self.name, "params": params, "grads": grads, "skipped": [], "lr": 1e-3, "weight_decay": 0.01, "step": 2}
        return given | self.settings


STEPS = (
    *(Step(name) for name in RULES), Step("adamw", LAYER), Step("lamb", LAYER), Step("adamw", dtype=F32),
    Step("sgd", changes={"beta1": 0.0}), Step("rmsprop", changes={"beta1": 0.0}),
)  # fmt: skip


def optimizer_step_8bit(values: Values) -> Calls:
    for step, blocksize in (*((step, BLOCKSIZE) for step in STEPS), *((Step("adamw"), blocksize) for blocksize in LONGER_BLOCKS)):
        call = step.arguments(values)
        for i, state in enumerate(ALL_STATES, 1):
            held = step.shapes if state in step.states else ()
            call[state] = [values.packed(*shape) for shape in held]
            call[f"absmax{i}"] = [values.uniform(torch.Size(shape).numel() // blocksize) for shape in held]
        code1, code2 = (dynamic_map(signed=signed, device=values.device) for signed in (True, False))
        title = step.title if blocksize == BLOCKSIZE else f"{step.title}, blocks of {blocksize}"
        yield title, call | {"code1": code1, "code2": code2, "blocksize": blocksize}


def optimizer_step_32bit(values: Values) -> Calls:
    for step in STEPS:
        call = step.arguments(values)
        for state in ALL_STATES:
            call[state] = [values.uniform(*shape) for shape in step.shapes] if state in step.states else []
        yield step.title, call
