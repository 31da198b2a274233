"""The figures as a page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimizers.convergence import Losses, departure
from optimizers.memory import Memory
from optimizers.paging import Paging


def markdown(losses: Mapping[str, Losses], memories: Sequence[Memory], pagings: Sequence[Paging], *, threads: int) -> str:
    """The page."""
    lines = [
        "# What the optimizers' precisions cost and save",
        "",
        f"Written by `nox -s optimizers`, at {threads} thread{'s' * (threads > 1)}. The optimizer is `q_optim.AdamW`.",
        "",
        "## Final losses",
        "",
        "The mean loss of the last tenth of the steps, one a seed; and the largest distance from that of 32-bit states with the same seed.",
        "",
    ]
    for task, by_variant in losses.items():
        seeds = len(next(iter(by_variant.values())))
        lines += _table(
            (f"{task}", *(f"seed {i}" for i in range(seeds)), "off by"),
            [
                (title, *(f"{loss:.4f}" for loss in found), f"{departure(by_variant, title):.2%}")
                for title, found in by_variant.items()
            ],
        )
    exact = memories[0]
    lines += [
        "## Memory",
        "",
        f"{exact.parameters / 1e6:.1f} million bfloat16 parameters, one step. The process's growth is in resident memory.",
        "",
        *_table(
            ("states", "bytes", "a parameter", "of 32 bits", "the process grew by"),
            [
                (
                    f"{m.bits} bits",
                    f"{m.states:,}",
                    f"{m.bytes_a_parameter:.3f}",
                    f"{m.states / exact.states:.1%}",
                    f"{m.process:,}",
                )
                for m in memories
            ],
        ),
        "## Paging",
        "",
        "States four times their budget of memory, the rest in a file that is mapped into memory; beside the same training unpaged.",
        "",
        *_table(
            ("states", "bytes", "budget", "step, ms", "paged", "with forward and backward, ms", "paged", "equal, bit for bit"),
            [
                (
                    f"{p.bits} bits",
                    f"{p.states:,}",
                    f"{p.budget:,}",
                    f"{p.step_seconds * 1e3:.0f}",
                    f"{p.paged_step_seconds * 1e3:.0f}",
                    f"{p.training_seconds * 1e3:.0f}",
                    f"{p.paged_training_seconds * 1e3:.0f}",
                    "yes" if p.equal else "**no**",
                )
                for p in pagings
            ],
        ),
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [*(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]
