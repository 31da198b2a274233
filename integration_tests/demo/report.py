"""What the demo found: a table for people, JSON for machines, and what missed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

LOSS_MARGIN = 1.02
NF4_MARGIN = 1.10


class Formats(TypedDict):
    """A figure for each format of the weights."""

    bf16: float
    nf4: float
    int8: float


class Lora(TypedDict):
    """Perplexity of the tuning slice's held-out text; ``merged`` after the adapters went into the 4-bit weights."""

    before: float
    after: float
    merged: float


class Serve(TypedDict):
    """The server's figures."""

    requests: int
    tokens_per_second: float
    time_to_first_token_s: float


class Report(TypedDict):
    """report.json."""

    device: str
    parameters: int
    training_tokens: int
    training_dtype: str
    loss_adamw: float
    loss_adamw8bit: float
    state_bytes_adamw: int
    state_bytes_adamw8bit: int
    perplexity: Formats
    weight_bytes: Formats
    lora: Lora
    serve: Serve
    sample: str
    sample_accepted_lines: float
    seconds: dict[str, float]


def misses(report: Report) -> Iterator[str]:
    """What the figures miss, in words."""
    loss, loss_8bit = report["loss_adamw"], report["loss_adamw8bit"]
    if not loss_8bit <= LOSS_MARGIN * loss:
        yield f"train: AdamW8bit ends at a loss of {loss_8bit:.4f}, over {LOSS_MARGIN} × AdamW's {loss:.4f}"
    perplexity = report["perplexity"]
    if not perplexity["nf4"] <= NF4_MARGIN * perplexity["bf16"]:
        yield f"quantize: perplexity in NF4 is {perplexity['nf4']:.2f}, over {NF4_MARGIN} × bf16's {perplexity['bf16']:.2f}"
    lora = report["lora"]
    if not lora["after"] < lora["before"]:
        yield f"fine-tune: perplexity went from {lora['before']:.2f} to {lora['after']:.2f}, expected less"


def table(report: Report) -> str:
    """The report in Markdown."""
    perplexity, size, lora, serve = report["perplexity"], report["weight_bytes"], report["lora"], report["serve"]
    states, states_8bit = report["state_bytes_adamw"], report["state_bytes_adamw8bit"]
    rows = [
        ("train", "final loss, AdamW", f"{report['loss_adamw']:.3f}"),
        ("", "final loss, AdamW8bit", f"{report['loss_adamw8bit']:.3f}"),
        ("", "optimizer state, AdamW", _megabytes(states)),
        ("", "optimizer state, AdamW8bit", f"{_megabytes(states_8bit)} ({states_8bit / states:.0%})"),
    ]
    for step, name in (("quantize", "bf16"), ("", "int8"), ("", "nf4")):
        share = f" ({size[name] / size['bf16']:.0%})"  # type: ignore[literal-required]
        rows.append((step, f"perplexity and weights, {name}", f"{perplexity[name]:.2f}, {_megabytes(size[name])}{share}"))  # type: ignore[literal-required]
    rows += [
        ("fine-tune", "perplexity before LoRA", f"{lora['before']:.2f}"),
        ("", "perplexity after", f"{lora['after']:.2f}"),
        ("", "perplexity after, merged into NF4", f"{lora['merged']:.2f}"),
        ("serve", "answers", f"{serve['requests']}"),
        ("", "16 at once", f"{serve['tokens_per_second']:.0f} tokens/s"),
        ("", "time to first token", f"{serve['time_to_first_token_s'] * 1000:.0f} ms"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    header = "| " + " | ".join(cell.ljust(width) for cell, width in zip(("step", "what", "found"), widths, strict=True)) + " |"
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([header, rule, *lines])


def write(report: Report, path: Path) -> None:
    """Write report.json."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"
