"""Refusals of hyper-parameters that can't be meant, before any training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def number(what: str, key: str, value: object, *, below: float = math.inf) -> None:
    """A finite number of 0 or more and less than ``below``; a tensor of one element is one too."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}: {key} is {type(value).__name__}, expected a number")
    if not 0 <= value < below:
        upper = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{what}: {key} is {value}, expected a number of 0 or more, {upper}")


def betas(what: str, values: object, count: int) -> None:
    """So many decay rates."""
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise ValueError(f"{what}: betas is {values!r}, expected {count} numbers")
    for i, beta in enumerate(values):
        number(what, f"betas[{i}]", beta, below=1)


def count(what: str, key: str, value: object) -> None:
    """An int of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: {key} is {type(value).__name__}, expected an int")
    if value < 0:
        raise ValueError(f"{what}: {key} is {value}, expected 0 or more")


def flag(what: str, key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{what}: {key} is {type(value).__name__}, expected a bool")


def one_of(what: str, key: str, value: object, options: Sequence[Any]) -> None:
    if isinstance(value, bool) or value not in options:
        raise ValueError(f"{what}: {key} is {value!r}, expected {' or '.join(map(repr, options))}")


def supported(what: str, key: str, value: object, options: Sequence[Any], why: str) -> None:
    """An argument that others have, of which some values are right here."""
    if not any(value is option or (type(value) is type(option) and value == option) for option in options):
        raise ValueError(f"{what}: {key} is {value!r}, expected {' or '.join(map(repr, options))}: {why}")
