"""``q-core conformance``: does a backend do what the surface says?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from importlib.util import find_spec

from q_core.cli.options import add_device, add_json

HELP = "test a backend against the surface: op by op passed, declined with the reason, or failed; exit code 1 if any failed"
EXTRA = ("hypothesis", "pytest")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", required=True, help="name of the backend, as `q-core doctor` prints it")
    parser.add_argument("--op", action="append", dest="ops", metavar="OP", help="only this op; may be given more than once")
    parser.add_argument(
        "--examples", type=int, default=30, help="calls that are made up for an op and a test (default: %(default)s)"
    )
    add_device(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    missing = [package for package in EXTRA if find_spec(package) is None]
    if missing:
        print(f"q-core conformance needs {' and '.join(missing)}: pip install 'q-core[testing]'", file=sys.stderr)
        return 2
    from q_core.testing.capabilities import Capabilities
    from q_core.testing.report import conformance

    capabilities = Capabilities(backend=arguments.backend, device=arguments.device, examples=arguments.examples)
    report = conformance(capabilities, ops=arguments.ops)
    print(json.dumps(dataclasses.asdict(report), indent=2) if arguments.json else report)
    return 1 if report.failed else 0
