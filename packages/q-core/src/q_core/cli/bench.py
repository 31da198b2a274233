"""``q-core bench``: what a call costs before any kernel works."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from q_core.cli.options import add_json, positive

HELP = "measure the cost of a call over its bare kernel, next to bitsandbytes' where that is installed"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    parser.add_argument(
        "--repeats", type=positive, default=80, help="measurements, of which the best counts (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from q_core.bench.dispatch import measure

    report = measure(repeats=arguments.repeats)
    text = json.dumps(report.as_dict(), indent=2)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")
    print(text if arguments.json else report)
    return 1 if arguments.check and report.missed() else 0
