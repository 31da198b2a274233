"""The ``q-core`` command. Torch is imported by the subcommands that need it, not for help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any


def doctor_report(device: str) -> dict[str, Any]:
    """What is installed, what is available, and who serves which op on a device type."""
    import torch

    from q_core import __version__
    from q_core.backend import SURFACE_VERSION, BackendConflictError
    from q_core.explanation import explain
    from q_core.registry import registry
    from q_core.specs import RECORDS

    backends = [
        {
            "name": loaded.name,
            "distribution": loaded.distribution,
            "state": loaded.state,
            "reason": loaded.reason,
            "summary": loaded.backend.summary if loaded.backend else "",
            "priority": loaded.backend.priority if loaded.backend else None,
            "ops": sorted(loaded.implementations),
            "traceback": loaded.traceback,
        }
        for loaded in registry().backends
    ]
    ops: dict[str, str] = {}
    for op in RECORDS:
        try:
            ops[op] = explain(op, device=device).served_by or "nobody"
        except BackendConflictError as conflict:
            ops[op] = f"conflict: {conflict}"
    return {
        "q_core": __version__,
        "surface_version": SURFACE_VERSION,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": device,
        "backends": backends,
        "ops": ops,
    }


def _print_doctor(report: dict[str, Any]) -> None:
    print(
        f"q-core {report['q_core']}, surface version {report['surface_version']}, "
        f"torch {report['torch']}, Python {report['python']}"
    )
    print("\nBackends, as asked: the highest priority first")
    for backend in sorted(report["backends"], key=lambda b: -(b["priority"] if b["priority"] is not None else 0)):
        print(f"  {backend['name']} ({backend['distribution']}): {backend['state']}, {backend['reason']}")
        if backend["summary"]:
            print(f"      {backend['summary']}; {len(backend['ops'])} ops here")
        if backend["traceback"]:
            print("      " + backend["traceback"].rstrip().replace("\n", "\n      "))
    print(f"\nOps on {report['device']}")
    width = max(map(len, report["ops"]))
    for op, served_by in report["ops"].items():
        print(f"  {op:<{width}}  {served_by}")


def _doctor(arguments: argparse.Namespace) -> int:
    report = doctor_report(arguments.device)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_doctor(report)
    return 1 if any(backend["state"] in ("failed", "refused") for backend in report["backends"]) else 0


def _explain(arguments: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from q_core.explanation import explain

    explanation = explain(arguments.op, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    print(json.dumps(dataclasses.asdict(explanation), indent=2) if arguments.json else explanation)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="q-core", description="Look at the op surface and its backends.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor", help="what is installed, what is available, who serves which op; exit code 1 if a backend is broken"
    )
    doctor.set_defaults(run=_doctor)
    explain = commands.add_parser("explain", help="who serves an op, and why the others decline")
    explain.add_argument("op", help="name of the op, such as gemm_4bit")
    explain.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    explain.set_defaults(run=_explain)
    for command in (doctor, explain):
        command.add_argument("--device", default="cpu", help="torch device type (default: %(default)s)")
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except ValueError as error:
        print(f"q-core: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())
