"""Measure all of it, write it down, and fail where a promise isn't kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from finetuning import memory, quality, report
from pages import write_between


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m finetuning", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--page", type=Path, help="a Markdown page to write, too")
    parser.add_argument("--readme", type=Path, help="a Markdown file whose table of memory to write anew")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="for training the model of the perplexities (default: %(default)s)"
    )
    arguments = parser.parse_args()

    memories = []
    for way in memory.WAYS:
        memories.append(memory.measure(way))
        print(f"{way.title}: {memories[-1].peak:,} bytes", flush=True)
    errors = quality.output_errors()
    perplexities = quality.perplexities(seconds=arguments.seconds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "memory": [asdict(measured) for measured in memories],
        "perplexity": perplexities,
        "output_errors": [asdict(error) for error in errors],
    }
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    page = report.markdown(memories, memory.Size(), perplexities, errors)
    print(page)
    if arguments.page is not None:
        arguments.page.write_text(page)
    if arguments.readme is not None:
        write_between(arguments.readme, "memory", report.memory_table(memories))
    misses = missed(memories, perplexities, errors)
    for miss in misses:
        print(f"missed: {miss}", file=sys.stderr)
    return bool(misses)


def missed(memories: Sequence[memory.Memory], perplexities: Mapping[str, float], errors: Sequence[quality.Error]) -> list[str]:
    """What isn't as promised, in words."""
    misses = []
    share = memories[-1].peak / memories[0].peak
    if share > memory.SHARE:
        misses.append(f"a step of {memory.WAYS[-1].title} takes {share:.1%} of the first's memory, over {memory.SHARE:.0%}")
    dense = perplexities[quality.DENSE]
    for format in quality.FORMATS:
        rise = perplexities[format.title] / dense
        if rise > format.perplexity_bound:
            misses.append(f"perplexity in {format.title} is {rise:.4f} × the dense one, over {format.perplexity_bound}")
    misses += [
        f"{error.architecture} in {error.format}: the output errs by {error.output:.2%}, over {error.allowed:.2%}"
        for error in errors
        if error.output > error.allowed
    ]
    return misses


if __name__ == "__main__":
    sys.exit(main())
