"""``q-core conformance``: does a backend do what the surface says?"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from q_core.cli.options import add_json, positive

if TYPE_CHECKING:
    from q_core.testing.report import Report

HELP = "test a backend against the surface: op by op passed, declined with the reason, or failed; exit code 1 if any failed"
EXTRA = ("hypothesis", "pytest")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", required=True, help="name of the backend, as `q-core doctor` prints it")
    parser.add_argument("--op", action="append", dest="ops", metavar="OP", help="only this op; may be given more than once")
    parser.add_argument(
        "--examples", type=positive, default=30, help="calls that are made up for an op and a test (default: %(default)s)"
    )
    parser.add_argument("--device", help="torch device of the calls (default: the first type that the backend serves)")
    add_json(parser)


def device_of(backend: str, asked: str | None) -> str:
    """The device of the calls.

    Raises:
        ValueError: there is no such backend, it doesn't serve the device, or torch can't use it here.
    """
    import torch

    from q_core.registry import registry

    registry().check_names([backend])
    (served,) = (loaded.backend.device_types for loaded in registry().backends if loaded.name == backend and loaded.backend)
    device = asked or (served[0] if served else "cpu")
    try:
        device_type = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"conformance: device is {device!r}, expected one that torch can use here: {str(error).splitlines()[0]}"
        ) from None
    if served is not None and device_type not in served:
        raise ValueError(f"conformance: device is {device!r}, expected one that {backend} serves: {', '.join(served)}.")
    return device


def run(arguments: argparse.Namespace) -> int:
    missing = [package for package in EXTRA if find_spec(package) is None]
    if missing:
        print(f"q-core: conformance needs {' and '.join(missing)}: pip install 'q-core[testing]'", file=sys.stderr)
        return 2
    from q_core.testing.capabilities import Capabilities
    from q_core.testing.report import conformance

    device = device_of(arguments.backend, arguments.device)
    report = conformance(Capabilities(backend=arguments.backend, device=device, examples=arguments.examples), ops=arguments.ops)
    print(json.dumps(dataclasses.asdict(report), indent=2) if arguments.json else f"{report}{how_to_mend(report)}")
    return 1 if report.failed else 0


def how_to_mend(report: Report) -> str:
    """What the tests that failed want, in the words of their docstrings."""
    from q_core.testing import suite

    failures = [*report.failures, *(failure for result in report.ops for failure in result.failures)]
    tests = dict.fromkeys(failure.test for failure in failures)
    docs = {test: inspect.getdoc(getattr(suite, test, None)) for test in tests if hasattr(suite, test)}
    return "".join(f"\n\n{test}: {doc}" for test, doc in docs.items())
