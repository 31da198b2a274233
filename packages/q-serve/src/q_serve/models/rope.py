"""Rotary position embedding: its configuration and its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q_serve.errors import ModelError


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of long wavelengths: those beyond ``context / low_freq_factor`` by ``factor``, a ramp up to there.

    Attributes:
        factor: how much longer the longest wavelengths become.
        low_freq_factor, high_freq_factor: the ramp's ends, in wavelengths a context.
        context: length of the context before stretching, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    context: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Which rotary embedding a model uses.

    Attributes:
        theta: base of the frequencies.
        scaling: ``None`` for the plain one.
    """

    theta: float
    scaling: Llama3Scaling | None = None

    @classmethod
    def from_config(cls, path: Path, raw: Mapping[str, Any]) -> RopeConfig:
        """Read ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``.

        Raises:
            ModelError: another type than "default" and "llama3", or a value that is missing or out of range.
        """
        name = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
        parameters = raw.get(name)
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, dict):
            raise ModelError(f"{path}: {name} is {parameters!r}, expected an object")
        parameters = {"rope_theta": raw.get("rope_theta", 10000.0), **parameters}

        def number(key: str) -> float:
            value = parameters.get(key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
                raise ModelError(f"{path}: {name}.{key} is {value!r}, expected a positive number")
            return float(value)

        kind = parameters.get("rope_type", parameters.get("type", "default"))
        known = {
            "default": set[str](),
            "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        }
        if not isinstance(kind, str) or kind not in known:
            raise ModelError(f"{path}: {name}.rope_type is {kind!r}, which q-serve does not support (only {', '.join(known)})")
        if parameters.get("partial_rotary_factor") == 1:
            del parameters["partial_rotary_factor"]
        if unknown := parameters.keys() - known[kind] - {"rope_theta", "rope_type", "type"}:
            raise ModelError(f"{path}: {name} of type {kind} has {', '.join(sorted(unknown))}, which q-serve does not support")
        theta = number("rope_theta")
        if kind == "default":
            return cls(theta)
        scaling = Llama3Scaling(
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            context=int(number("original_max_position_embeddings")),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ModelError(f"{path}: {name}.high_freq_factor is {scaling.high_freq_factor}, expected more than low_freq_factor")
        return cls(theta, scaling)


def rope_tables(config: RopeConfig, head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by position, as :func:`q_core.ops.rotary_embedding` takes them.

    Args:
        config: which embedding.
        head_dim: components of a head, all of which rotate.
        length: number of positions.

    Returns:
        cos, sin: float32 [length, head_dim / 2] on the CPU.
    """
    frequencies = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if (scaling := config.scaling) is not None:
        turns = scaling.context * frequencies / (2 * math.pi)
        ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        ramp = ramp.clamp(0, 1)
        frequencies = frequencies * (ramp + (1 - ramp) / scaling.factor)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()
