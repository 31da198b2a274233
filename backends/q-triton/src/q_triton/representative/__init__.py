"""Calls as models make them, of every op that q_triton implements: what is compiled ahead of time, tuned and measured.

A module a family, a function an op, which makes its calls one after another: the largest take gigabytes. Sizes and settings are chosen so
that together they reach every kernel, every constant that a kernel is compiled for and every tile of every table, and few of them
twice: what a call adds is compiled for five targets. Where a new kernel or tile isn't reached, a test says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from q_core.record import Arguments
from q_core.specs import record_of
from q_triton.representative.values import Values

__all__ = ["Example", "Values", "examples"]


@dataclass(frozen=True, slots=True)
class Example:
    """A call of an op.

    Attributes:
        op: its name.
        title: what is particular about the call.
        arguments: every argument of the hook, by name.
    """

    op: str
    title: str
    arguments: Arguments

    def __str__(self) -> str:
        return f"{self.op}, {self.title}"


def examples(values: Values, ops: Iterable[str]) -> Iterator[Example]:
    """The calls of these ops, with tensors from ``values``.

    Raises:
        ValueError: there is none of an op.
    """
    for op in ops:
        module = f"{__name__}.{record_of(op).family}"
        made = getattr(importlib.import_module(module), op, None)
        if made is None:
            raise ValueError(f"there is no representative call of {op}: write a function of that name in {module}.")
        for title, arguments in made(values):
            yield Example(op, title, arguments)
