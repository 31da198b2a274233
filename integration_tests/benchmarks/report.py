"""A run's records as JSON, as a table for people, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import Record

COLUMNS = ("op", "shape", "threads", "ours, ms", "peer", "peer, ms", "ratio", "of the bound", "target", "met")


def write_json(records: Sequence[Record], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(record) for record in records], indent=1, ensure_ascii=False) + "\n")


def cells(record: Record) -> tuple[str, ...]:
    """A record as a table has it, by :data:`COLUMNS`."""
    return (
        record.op,
        f"{record.shape}, {record.dtype}",
        str(record.threads),
        f"{record.ours_ms:.3g}",
        record.peer or "",
        "" if record.peer_ms is None else f"{record.peer_ms:.3g}",
        "" if record.ratio is None else f"{record.ratio:.2f}",
        "" if record.bound_fraction is None else f"{record.bound_fraction:.0%} {record.bound}",
        record.target,
        {True: "yes", False: "**no**", None: ""}[record.met],
    )


def markdown(records: Sequence[Record], machine: Sequence[str]) -> str:
    """The table as a page of the documentation."""
    lines = [
        "# q-cpu beside its peers",
        "",
        "Written by `nox -s bench`. Times are medians; peers were measured in the same run, in turns with ours, on inputs that don't fit",
        "into the cache together. A ratio above 1 says how many times ours the peer's time is. The bound is the bandwidth that the same",
        "run measured. The session keeps freed memory (MALLOC_MMAP_MAX_=0): a large output in fresh pages, ours or a peer's, costs many",
        "times its computing. What bounds the kernels, those that miss a target above all: [products](profile-gemm.md),",
        "[streaming kernels and optimizers](profile-stream.md), [attention](profile-attn.md).",
        "",
        *(f"- {line}" for line in machine),
        "",
        "![Ratios to the best peer](bench-cpu.png)",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells(record)) + " |" for record in records),
        "",
    ]
    return "\n".join(lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """Ratios to the best peer, one bar a record, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [record for record in records if record.ratio is not None]
    figure, axes = pyplot.subplots(figsize=(10, 0.22 * len(shown) + 1.5))
    colors = ["tab:red" if record.met is False else "tab:blue" if record.threads == 1 else "tab:cyan" for record in shown]
    axes.barh(range(len(shown)), [record.ratio for record in shown], color=colors, left=0)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [f"{r.op}, {r.shape}, {r.threads} thread{'s' * (r.threads > 1)}" for r in shown], fontsize=7)
    axes.margins(y=0.5 / max(1, len(shown)))
    axes.invert_yaxis()
    axes.set_xlabel("the best peer's time over ours (red: target missed)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
