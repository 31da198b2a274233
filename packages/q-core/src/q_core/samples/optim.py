"""Sample calls of the optim family: every rule, with and without what is optional in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import ALL_STATES, RULES, SETTINGS
from q_core.samples.make import Make

SHAPES: tuple[tuple[int, ...], ...] = ((300,), (16, 33), (1,), (256, 2), (0, 5))


def draw_shapes(make: Make) -> tuple[tuple[int, ...], ...]:
    return tuple(make.shape(30, 30) if make.size(0, 1) else (make.size(1, 600),) for _ in range(make.size(1, 3)))


VALUES: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.99,
    "beta3": 0.999,
    "alpha": 4.0,
    "eps": 1e-8,
    "dampening": 0.1,
    "nesterov": False,
    "trust_coefficient": 1e-2,
}


def _settings(name: str, **changes: Any) -> dict[str, Any]:
    used = {setting: VALUES[setting] if setting in RULES[name].settings else type(VALUES[setting])() for setting in SETTINGS}
    return {"name": name, "lr": 1e-2, "weight_decay": 0.1, "step": 3} | used | changes


def _calls() -> Iterator[dict[str, Any]]:
    for name in RULES:
        yield _settings(name)
    yield _settings("sgd", beta1=0.0, dampening=0.0)
    yield _settings("sgd", dampening=0.0, nesterov=True)
    yield _settings("sgd", step=1)
    yield _settings("rmsprop", beta1=0.0, weight_decay=0.0)
    yield _settings("lars", beta1=0.0, dampening=0.0)
    yield _settings("adamw", weight_decay=0.0, step=1)


def _tensors(make: Make, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> dict[str, Any]:
    return {argument: [make.normal(*shape, dtype=dtype) for shape in shapes] for argument in ("params", "grads")}


def _cases(make: Make) -> Iterator[tuple[dict[str, Any], tuple[tuple[int, ...], ...]]]:
    for settings in _calls():
        for shapes in make.cases((SHAPES,), draw_shapes):
            yield settings, shapes


def _counters(make: Make, shapes: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    return [make.integers(low=0, high=9, dtype=torch.int64) for _ in shapes] if make.option(1, 0) else []


def optimizer_step_8bit(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for settings, shapes in _cases(make):
        kept = RULES[settings["name"]].names(settings["beta1"])
        blocksize = make.choice((256, 64))
        call = _tensors(make, shapes, dtype) | settings
        for i, state in enumerate(ALL_STATES, 1):
            held = shapes if state in kept else ()
            call[state] = [make.integers(*shape, low=0, high=256, dtype=torch.uint8) for shape in held]
            call[f"absmax{i}"] = [make.uniform(-(-torch.Size(shape).numel() // blocksize), low=0.1) for shape in held]
        call["skipped"] = _counters(make, shapes)
        yield call | {"code1": dynamic_map(signed=True), "code2": dynamic_map(signed=False), "blocksize": blocksize}


def optimizer_step_32bit(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for settings, shapes in _cases(make):
        kept = RULES[settings["name"]].names(settings["beta1"])
        call = _tensors(make, shapes, dtype) | settings
        for state in ALL_STATES:
            draw = make.uniform if state == "state2" else make.normal
            call[state] = [draw(*shape) for shape in shapes] if state in kept else []
        call["skipped"] = _counters(make, shapes)
        yield call
