"""A run's records as JSON, as a table for people, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import Record
from pages import table

COLUMNS = ("op", "shape", "threads", "ours, ms", "peer", "peer, ms", "ratio", "of the bound", "target", "met")


SUMMARIZED = ("1", "16", "512")
PEERS = ("bitsandbytes", "torch bf16")


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


def ops_page(records: Sequence[Record], machine: Sequence[str]) -> str:
    """The page of the documentation on the ops: one table."""
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


def modules_page(records: Sequence[Record], machine: Sequence[str]) -> str:
    """The page of the documentation on q_nn's modules: a table for each, with every peer."""
    lines = [
        "# q-nn's modules beside bitsandbytes' and torch's",
        "",
        "Written by `nox -s bench`. Layers of 4096 × 4096, frozen, bfloat16 activations; «torch bf16» is `nn.Linear`. Backward gives the",
        "gradient of the input, and of adapters where there are any. Inputs of «threshold 6» have four columns 60 times as large as",
        "the others. Adapters have rank 16, in float32; the peers have theirs beside their layers, as PEFT does it. Times are medians,",
        "in turns in one run, on weights that don't fit into the cache together. Ratios are a peer's time over ours: above 1, q-nn wins.",
        "The session keeps freed memory (MALLOC_MMAP_MAX_=0), for all. Memory, perplexity and errors: [measured too](finetuning.md).",
        "",
        *(f"- {line}" for line in machine),
    ]
    for op, own in _by_op(records).items():
        peers = list(own[0].peers_ms)
        head = (
            "tokens",
            "threads",
            "q-nn, ms",
            *(f"{peer}, ms" for peer in peers),
            *(f"{peer} / q-nn" for peer in peers),
            "target",
            "met",
        )
        lines += ["", f"## {op}", "", *table(head, [_beside_all(record) for record in own])]
    return "\n".join([*lines, ""])


def modules_summary(records: Sequence[Record]) -> list[str]:
    """A short table for people who choose: how many times as fast as each peer, at the most threads, for some numbers of tokens."""
    most = max(record.threads for record in records)
    columns: dict[tuple[str, str], None] = {}
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for record in records:
        tokens = record.shape.split()[0]
        if record.threads == most and tokens in SUMMARIZED:
            columns[tokens, record.dtype] = None
            ratios = " · ".join(
                f"{record.peers_ms[peer] / record.ours_ms:.1f}" if peer in record.peers_ms else "–" for peer in PEERS
            )
            rows.setdefault(record.op, {})[tokens, record.dtype] = ratios
    head = ("× " + " · ".join(PEERS), *(f"{tokens} token{'s' * (tokens != '1')}" for tokens, _ in columns))
    return table(head, [(op, *(found.get(column, "") for column in columns)) for op, found in rows.items()])


def _by_op(records: Sequence[Record]) -> dict[str, list[Record]]:
    by_op: dict[str, list[Record]] = {}
    for record in records:
        by_op.setdefault(record.op, []).append(record)
    return by_op


def _beside_all(record: Record) -> tuple[str, ...]:
    return (
        record.shape.split()[0],
        str(record.threads),
        f"{record.ours_ms:.3g}",
        *(f"{ms:.3g}" for ms in record.peers_ms.values()),
        *(f"{ms / record.ours_ms:.2f}" for ms in record.peers_ms.values()),
        *cells(record)[-2:],
    )


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
