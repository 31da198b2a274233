"""How a kernel's work is cut up, a target at a time.

Beside each kernel's host function stands its :class:`Tiles`: a name and the portable choice, which compiles everywhere. A backend gives
what is better on a target of its own as a table entry, and :mod:`q_triton.tune` finds on the device itself which of all known tiles is
best there. The first source that knows the kernel decides: tuned, the target's table, portable.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from q_triton.targets import Target, compiling, target_of


@dataclass(frozen=True, slots=True)
class Tile:
    """One way to cut a kernel's work.

    Attributes:
        blocks: values of the kernel's block sizes, by parameter name.
        warps: warps (AMD: wavefronts, Intel: sub-groups) of a program.
        stages: depth of the software pipeline of a loop's loads.
        up_to: the largest size (as the kernel's :class:`Tiles` says which) that it is for; ``None`` for any.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 1
    up_to: int | None = None

    def is_for(self, size: int) -> bool:
        """Whether a call of this size isn't too large for it."""
        return self.up_to is None or size <= self.up_to

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.blocks.items())), self.warps, self.stages, self.up_to))


def tile(*, warps: int = 4, stages: int = 1, up_to: int | None = None, **blocks: int) -> Tile:
    """A :class:`Tile`, as tables write it: ``tile(BLOCK_T=16, BLOCK_N=64, warps=4, stages=3, up_to=16)``."""
    return Tile(blocks, warps, stages, up_to)


Table = Mapping[str, Sequence[Tile]]
"""Tiles by kernel, those for smaller sizes first; what isn't in it is as the portable one."""

_tables: dict[str, Table] = {}
_tuned: dict[str, Table] = {}


def register(tables: Mapping[str, Table]) -> None:
    """Add a backend's tables, by target."""
    _tables.update(tables)
    _source.cache_clear()


def use_tuned(target: str, table: Table) -> None:
    """Let these tiles come before all others on a target, in this process."""
    _tuned[target] = {**_tuned.get(target, {}), **table}
    _source.cache_clear()


def table_of(target: Target) -> Table:
    """The target's own table; where it has none, that of the newest older target of its platform."""
    older = [name for name in _tables if target.platform == "cuda" and name.startswith("sm_") and _age(name) <= target.capability]
    return _tables.get(target.name) or (_tables[max(older, key=_age)] if older else {})


def _age(name: str) -> int:
    return int(name.removeprefix("sm_"))


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a kernel.

    Attributes:
        kernel: the name that tables have for it.
        portable: for targets without an entry, those for smaller sizes first.
        size: what ``up_to`` counts, such as "tokens".
    """

    kernel: str
    portable: tuple[Tile, ...]
    size: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if self.kernel in KERNELS:
            raise ValueError(f"the tiles of {self.kernel!r} are declared twice.")
        KERNELS[self.kernel] = self

    def on(self, device: torch.device, size: int = 0) -> Tile:
        """The tile for a call of this size on a device.

        Raises:
            ValueError: there is none; :meth:`covers` says so before.
        """
        choices = _source(self.kernel, target_of(device), None if compiling() else device)
        choice = next((choice for choice in choices if choice.is_for(size)), None)
        if choice is None:
            raise ValueError(f"{self.kernel} has no tile for {size} {self.size} on {target_of(device).name}.")
        return choice if _chooser is None else _chooser(self, size, choice)

    def covers(self, device: torch.device, size: int) -> bool:
        """Whether there is a tile for a call of this size; of a device that isn't known yet, such as meta, the best is hoped."""
        if device.type == "meta" and not compiling():
            return True
        return any(choice.is_for(size) for choice in _source(self.kernel, target_of(device), None if compiling() else device))

    def __hash__(self) -> int:
        return hash(self.kernel)

    def known(self) -> list[Tile]:
        """Every tile that some table has for the kernel: what tuning tries."""
        entries = (table.get(self.kernel, ()) for table in _tables.values())
        return list(dict.fromkeys(choice for choices in (self.portable, *entries) for choice in choices))


KERNELS: dict[str, Tiles] = {}
"""Every kernel that has tiles, by name."""


Chooser = Callable[[Tiles, int, Tile], Tile]
"""From a kernel, the size of a call and the tile that it would get, the one that it gets."""

_chooser: Chooser | None = None


@contextlib.contextmanager
def chosen_by(chooser: Chooser) -> Iterator[None]:
    """Let a function have the last word on every tile."""
    global _chooser
    before, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = before


@functools.cache
def _source(kernel: str, target: Target, device: torch.device | None) -> Sequence[Tile]:
    from q_triton.tuned import tuned_tiles  # what it reads are tiles

    for table in (_tuned.get(target.name, {}), {} if device is None else tuned_tiles(device), table_of(target)):
        if kernel in table:
            return table[kernel]
    return KERNELS[kernel].portable


def as_json(choice: Tile) -> dict[str, Any]:
    """A tile as plain data."""
    return {"blocks": dict(choice.blocks), "warps": choice.warps, "stages": choice.stages, "up_to": choice.up_to}


def from_json(data: Mapping[str, Any]) -> Tile:
    """What :func:`as_json` made.

    Raises:
        ValueError: it isn't that.
    """
    try:
        blocks = {str(name): int(value) for name, value in data["blocks"].items()}
        up_to = data["up_to"]
        return Tile(blocks, int(data["warps"]), int(data["stages"]), None if up_to is None else int(up_to))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{data!r} is no tile: {error!r}") from None
