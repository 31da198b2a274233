"""Measure all of it, write it down, and fail where a promise isn't kept."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from optimizers import convergence, memory, paging, report

STATES_SHARE = {8: 0.26, 4: 0.14}
"""What states may take, as a share of those in 32 bits."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m optimizers", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--page", type=Path, help="a Markdown page to write, too")
    parser.add_argument("--steps", type=int, default=200, help="of the language model's training (default: %(default)s)")
    arguments = parser.parse_args()

    memories = {bits: memory.measure(bits) for bits in (32, 8, 4)}
    with tempfile.TemporaryDirectory(dir=arguments.output.absolute().parent.parent) as directory:
        pagings = [paging.measure(bits, Path(directory)) for bits in (32, 8)]
    losses = {
        "residual layers": convergence.classification(),
        "the demo's language model": convergence.language_model(steps=arguments.steps),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "losses": losses,
        "memory": [asdict(measured) for measured in memories.values()],
        "paging": [asdict(measured) for measured in pagings],
    }
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    page = report.markdown(losses, list(memories.values()), pagings, threads=torch.get_num_threads())
    print(page)
    if arguments.page is not None:
        arguments.page.write_text(page)
    misses = missed(losses, memories, pagings)
    for miss in misses:
        print(f"missed: {miss}", file=sys.stderr)
    return bool(misses)


def missed(losses: dict[str, convergence.Losses], memories: dict[int, memory.Memory], pagings: list[paging.Paging]) -> list[str]:
    """What isn't as promised, in words."""
    misses = []
    for task, by_variant in losses.items():
        found = convergence.departure(by_variant, convergence.VARIANTS[1].title)
        if found > convergence.MARGIN_8BIT:
            misses.append(f"{task}: a final loss of 8-bit states is {found:.2%} off, over {convergence.MARGIN_8BIT:.0%}")
    for bits, share in STATES_SHARE.items():
        found = memories[bits].states / memories[32].states
        if found > share:
            misses.append(f"states of {bits} bits take {found:.1%} of those of 32, over {share:.0%}")
    misses += [f"the paged run of {measured.bits} bits differs from the unpaged one" for measured in pagings if not measured.equal]
    return misses


if __name__ == "__main__":
    sys.exit(main())
