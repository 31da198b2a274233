"""Runs on a GPU as JSON, and as a page of the documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import Record
from pages import table

COLUMNS = ("op", "shape", "µs", "rate", "of the bound", "peers' time over ours", "error", "gate", "met", "stretch")
UNITS = {"copy": "TB/s", "read": "TB/s", "matrix": "TFLOP/s"}

HEAD = """# On a GPU

Written by `nox -s gpu`, or `nox -s bench -- gpu`. Each op's result was compared with float64's, or its codes with the reference's,
before its time was taken: «error» is the length of the difference over that of the result. Times are medians of the device's own
events around replayed graphs, in turns with the peers', over inputs that don't fit into the last-level cache together; of what waits
for the device, or whose host side is what is measured, with its launches. A rate counts bytes that must be read and written, or
multiplications and additions; its bound is the rate at which the same run copied memory, or multiplied matrices in bfloat16.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """What one process measured.

    Attributes:
        date: ISO 8601.
        machine: device, versions, yardsticks, a line each.
        records: the measurements.
    """

    date: str
    machine: Sequence[str]
    records: Sequence[Record]


def read(path: Path) -> list[Run]:
    """The runs of a file; none, if it isn't there."""
    if not path.exists():
        return []
    return [
        Run(run["date"], run["machine"], [Record(**record) for record in run["records"]]) for run in json.loads(path.read_text())
    ]


def write(runs: Sequence[Run], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(run) for run in runs], indent=1, ensure_ascii=False) + "\n")


def cells(record: Record) -> tuple[str, ...]:
    """A record as a table has it, by :data:`COLUMNS`."""
    ratios = (f"{ms / record.ours_ms:.2f} {peer}" for peer, ms in record.peers_ms.items())
    yes = {True: "yes", False: "**no**", None: ""}
    return (
        record.op,
        f"{record.shape}, {record.dtype}",
        f"{record.ours_ms * 1e3:.4g}",
        "" if record.rate is None or record.bound is None else f"{record.rate / 1e12:.3g} {UNITS[record.bound]}",
        "" if record.bound_fraction is None else f"{record.bound_fraction:.0%} {record.bound}",
        "; ".join(ratios),
        "" if record.error is None else f"{record.error:.1e}",
        record.target,
        yes[record.met],
        f"{record.stretch}: {yes[record.stretched]}" if record.stretch else "",
    )


def page(runs: Sequence[Run]) -> str:
    """The page: a section a run, the latest first."""
    lines = [HEAD]
    for run in reversed(runs):
        lines += [f"## {run.date}: {run.machine[0]}", "", *(f"- {line}" for line in run.machine[1:]), ""]
        lines += [*table(COLUMNS, [cells(record) for record in run.records]), ""]
    return "\n".join(lines)
