"""``q-core doctor``: what is installed, what is available, and who serves what."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

from q_core.cli.options import add_device, add_json

HELP = "what is installed, what is available, who serves which op; exit code 1 if a backend is broken or two are in conflict"


def configure(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_json(parser)


def report(device: str) -> dict[str, Any]:
    """What is installed, what is available, and who serves which op on a device type."""
    import torch

    from q_core import __version__
    from q_core.backend import SURFACE_VERSION, BackendError
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
            "layouts": list(loaded.backend.layouts) if loaded.backend else [],
            "traceback": loaded.traceback,
        }
        for loaded in registry().backends
    ]
    ops: dict[str, str] = {}
    declined: dict[str, dict[str, str]] = {}
    faults: dict[str, str] = {}
    for op in RECORDS:
        try:
            explanation = explain(op, device=device)
        except BackendError as fault:
            ops[op], faults[op] = "nobody", str(fault)
            continue
        ops[op] = explanation.served_by or "nobody"
        implementing = {loaded.name for loaded in registry().backends if op in loaded.implementations}
        asked_first = itertools.takewhile(lambda verdict: verdict.reason is not None, explanation.verdicts)
        reasons = {verdict.backend: verdict.reason or "" for verdict in asked_first if verdict.backend in implementing}
        if reasons:
            declined[op] = reasons
    return {
        "q_core": __version__,
        "surface_version": SURFACE_VERSION,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": device,
        "backends": backends,
        "ops": ops,
        "declined": declined,
        "faults": faults,
    }


def _print(report: dict[str, Any]) -> None:
    print(
        f"q-core {report['q_core']}, surface version {report['surface_version']}, "
        f"torch {report['torch']}, Python {report['python']}"
    )
    print("\nBackends, as asked: the highest priority first")
    for backend in sorted(report["backends"], key=lambda b: -(b["priority"] if b["priority"] is not None else 0)):
        print(f"  {backend['name']} ({backend['distribution']}): {backend['state']}, {backend['reason']}")
        if backend["summary"]:
            layouts = f"; weight layouts {', '.join(backend['layouts'])}" if backend["layouts"] else ""
            print(f"      {backend['summary']}; {len(backend['ops'])} ops here{layouts}")
        if backend["traceback"]:
            print("      " + backend["traceback"].rstrip().replace("\n", "\n      "))
    print(f"\nOps on {report['device']}: who serves a sample call; `q-core explain OP` tells more")
    width = max(map(len, report["ops"]))
    for op, served_by in report["ops"].items():
        reasons = [f"{backend} declines: {reason}" for backend, reason in report["declined"].get(op, {}).items()]
        said = [report["faults"][op]] if op in report["faults"] else reasons
        print(f"  {op:<{width}}  {served_by}" + (f" ({'; '.join(said)})" if said else ""))


def run(arguments: argparse.Namespace) -> int:
    found = report(arguments.device)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    broken = any(backend["state"] in ("failed", "refused") for backend in found["backends"])
    return 1 if broken or found["faults"] else 0
