"""The environment variables of q-core, read here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

FallbackPolicy = Literal["allow", "error"]


@dataclass(frozen=True, slots=True)
class Environment:
    """Settings from the environment.

    Attributes:
        backends: ``Q_BACKENDS``, names separated by commas: only these may serve; ``None`` for all.
        fallback: ``Q_FALLBACK``: whether the reference may serve a call that every backend declined.
    """

    backends: tuple[str, ...] | None
    fallback: FallbackPolicy


def read_environment() -> Environment:
    """Read the settings.

    Raises:
        ValueError: a variable has a value that means nothing.
    """
    names = [name.strip() for name in os.environ.get("Q_BACKENDS", "").split(",")]
    selected = tuple(name for name in names if name)
    fallback = os.environ.get("Q_FALLBACK", "allow")
    for policy in get_args(FallbackPolicy):
        if fallback == policy:
            return Environment(backends=selected or None, fallback=policy)
    raise ValueError(f"Q_FALLBACK is {fallback!r}, expected one of: {', '.join(get_args(FallbackPolicy))}.")
