"""What has to be compiled for a target: every distinct kernel that the representative calls launch there."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from q_core.backend import ENTRY_POINT_GROUP, Backend
from q_triton.aot.compiling import source_of
from q_triton.implementations import call, declined, implementations
from q_triton.launch import Launch, recorded
from q_triton.plugins import FAMILIES
from q_triton.representative import Values, examples
from q_triton.targets import Target, compiling_for


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with the types, constants and tile that it is compiled for.

    Attributes:
        target: what it is compiled for.
        kernel: the function's name.
        label: types, constants and tile in short; no other variant of the kernel and target has it.
        example: the first call that launches it.
        launch: as it was recorded.
    """

    target: Target
    kernel: str
    label: str
    example: str
    launch: Launch


def register_tables() -> None:
    """Import the tables of every backend that is installed and serves this package's kernels."""
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        backend = entry_point.load()
        if isinstance(backend, Backend) and set(FAMILIES) <= set(backend.families):
            for module in backend.families:
                importlib.import_module(module)


def variants(target: Target, *, ops: Collection[str] = (), kernels: Collection[str] = ()) -> list[Variant]:
    """The variants that the representative calls launch on a target.

    Args:
        target: what they are for.
        ops: of these ops alone; empty for all.
        kernels: of these kernels alone, by parts of their names; empty for all.
    """
    found: dict[Any, tuple[Launch, str]] = {}
    launches: list[Launch] = []
    hosts = implementations()
    with compiling_for(target), recorded(launches.append):
        for example in examples(Values("meta"), [op for op in hosts if not ops or op in ops]):
            launches.clear()
            if declined(hosts[example.op], example.arguments):
                continue
            call(hosts[example.op], example.arguments)
            for launch in launches:
                if not kernels or any(part in launch.kernel.__name__ for part in kernels):
                    found.setdefault(_identity(launch, target), (launch, str(example)))
    return _labelled(target, list(found.values()))


def _identity(launch: Launch, target: Target) -> Any:
    """What two launches have in common exactly if one compilation serves both."""
    source = source_of(launch, target)
    return launch.kernel.__name__, source.hash(), launch.tile.warps, launch.tile.stages, launch.exact


def _labelled(target: Target, found: list[tuple[Launch, str]]) -> list[Variant]:
    made: dict[tuple[str, str], Variant] = {}
    for launch, example in found:
        kernel, label = launch.kernel.__name__, label_of(launch, target)
        # Variants may differ in what a label leaves out, as which sizes are multiples of 16.
        labels = itertools.chain((label,), (f"{label} #{number}" for number in itertools.count(2)))
        free = next(label for label in labels if (kernel, label) not in made)
        made[kernel, free] = Variant(target, kernel, free, example, launch)
    return list(made.values())


def label_of(launch: Launch, target: Target) -> str:
    """A launch's types, constants and tile in short: ``5 bf16; ADD=1 BLOCK_K=4096; 8 warps``."""
    source = source_of(launch, target)
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(_pointers(source.signature.values()))]
    types = " ".join(kind if count == 1 else f"{count} {kind}" for kind, count in runs)
    names = list(source.signature)
    # What is None shows in the types; of a tuple's items none is worth its place here.
    known = {names[place[0]]: value for place, value in source.constants.items() if value is not None and len(place) == 1}
    constants = " ".join(f"{name}={_short(value)}" for name, value in known.items())
    tile = launch.tile
    way = f"{tile.warps} warps" + (f" {tile.stages} stages" if tile.stages > 1 else "") + (" exact" if launch.exact else "")
    return "; ".join(part for part in (types, constants, way) if part)


def _pointers(types: Iterable[Any]) -> Iterator[str]:
    """What the pointers among an argument's types point to, those in tuples too."""
    for kind in types:
        if isinstance(kind, tuple):
            yield from _pointers(kind)
        elif kind.startswith("*"):
            yield kind.removeprefix("*")


def _short(value: Any) -> str:
    return str(int(value) if isinstance(value, bool) else value)
