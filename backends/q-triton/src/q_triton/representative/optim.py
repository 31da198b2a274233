"""Calls of the optim family: a step of every rule on a layer's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import ALL_STATES, RULES, SETTINGS
from q_core.record import Arguments
from q_triton.representative.values import BF16, F32, TITLES, Calls, Values

SHAPES = ((4096, 4096), (14336, 4096), (4096,))
BLOCKSIZE = 256
VALUES: dict[str, Any] = {
    "beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "alpha": 5.0, "eps": 1e-8, "dampening": 0.0, "nesterov": False,
    "trust_coefficient": 0.01,
}  # fmt: skip


def _steps() -> Iterator[tuple[str, torch.dtype, dict[str, Any]]]:
    """Rules with what differs from the usual."""
    for name in RULES:
        yield name, BF16, {}
    yield "adamw", F32, {}
    yield "sgd", BF16, {"beta1": 0.0}
    yield "rmsprop", BF16, {"beta1": 0.0}


def _step(values: Values, name: str, dtype: torch.dtype, changes: dict[str, Any]) -> tuple[str, Arguments, tuple[str, ...]]:
    """A title, the arguments that don't depend on how the states are held, and which states there are."""
    settings = {
        setting: VALUES[setting] if setting in RULES[name].settings else type(VALUES[setting])() for setting in SETTINGS
    } | changes
    title = ", ".join((name, TITLES[dtype], *(f"{setting}={value}" for setting, value in changes.items())))
    call = {argument: [values.normal(*shape, dtype=dtype) for shape in SHAPES] for argument in ("params", "grads")}
    return (
        title,
        {"name": name, **call, "skipped": [], "lr": 1e-3, "weight_decay": 0.01, "step": 2, **settings},
        RULES[name].names(settings["beta1"]),
    )


def optimizer_step_8bit(values: Values) -> Calls:
    for name, dtype, changes in _steps():
        title, call, kept = _step(values, name, dtype, changes)
        for i, state in enumerate(ALL_STATES, 1):
            held = SHAPES if state in kept else ()
            call[state] = [values.packed(*shape) for shape in held]
            call[f"absmax{i}"] = [values.uniform(torch.Size(shape).numel() // BLOCKSIZE) for shape in held]
        code1, code2 = (dynamic_map(signed=signed, device=values.device) for signed in (True, False))
        yield title, call | {"code1": code1, "code2": code2, "blocksize": BLOCKSIZE}


def optimizer_step_32bit(values: Values) -> Calls:
    for name, dtype, changes in _steps():
        title, call, kept = _step(values, name, dtype, changes)
        for state in ALL_STATES:
            make = values.uniform if state == "state2" else values.normal
            call[state] = [make(*shape).float() for shape in SHAPES] if state in kept else []
        yield title, call
