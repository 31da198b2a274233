"""``python -m q_triton.aot``: compile every kernel for every target, and fail where the gate does. Needs no GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import triton_key

from q_core.specs import RECORDS
from q_triton.aot import snapshot
from q_triton.aot.gate import LIMIT_S, SHARED_BYTES, Checked, check
from q_triton.aot.processes import Done, Failure, in_processes
from q_triton.aot.variants import Variant, register_tables, variants
from q_triton.environment import interpreted
from q_triton.targets import target_named

Compiled = Done[Variant, Checked]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m q_triton.aot", description=(__doc__ or "").partition(": ")[2])
    made.add_argument("--target", action="append", choices=SHARED_BYTES, help="for this target only; may be given more than once")
    made.add_argument("--op", action="append", choices=RECORDS, help="what this op launches only; may be given more than once")
    made.add_argument("--kernel", action="append", help="kernels with this in their names only; may be given more than once")
    made.add_argument("--snapshot", type=Path, help="registers and shared memory must be as in this file")
    made.add_argument("--update", action="store_true", help="write that file instead")
    made.add_argument("--output", type=Path, help="write every figure into this file, as JSON")
    made.add_argument("--keep", action="store_true", help="use Triton's cache of compiled kernels")
    made.add_argument("--verbose", action="store_true", help="print every variant")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="compilations at a time (default: %(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    partial = bool(options.target or options.op or options.kernel)
    if interpreted():
        print("kernels are interpreted in this process: unset TRITON_INTERPRET.", file=sys.stderr)
        return 2
    if options.update and (partial or options.snapshot is None):
        print("--update needs --snapshot, and everything: no --target, --op or --kernel.", file=sys.stderr)
        return 2
    register_tables()
    targets = [target_named(name) for name in options.target or SHARED_BYTES]
    jobs = [variant for target in targets for variant in variants(target, ops=options.op or (), kernels=options.kernel or ())]
    with ExitStack() as stack:
        if not options.keep:
            triton.knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        triton_key()  # takes a second, and every process would
        results = []
        for done in in_processes(check, jobs, workers=options.workers, limit_s=LIMIT_S):
            results.append(done)
            if options.verbose or faults_of(done):
                print(line_of(done), flush=True)
    print(table([target.name for target in targets], results))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps({"triton": triton.__version__, "variants": [as_json(done) for done in results]}, indent=1)
        )
    faulty = sum(bool(faults_of(done)) for done in results)
    if faulty:
        print(f"{faulty} of {len(results)} compilations are at fault; they are listed above.")
        return 1
    return compare(options.snapshot, figures(results), partial=partial, update=options.update) if options.snapshot else 0


def faults_of(done: Compiled) -> tuple[str, ...]:
    """What is wrong with a variant; that it has no result, to begin with."""
    return (done.result.reason,) if isinstance(done.result, Failure) else done.result.faults


def line_of(done: Compiled) -> str:
    """A variant in a line."""
    variant = done.job
    took = "" if isinstance(done.result, Failure) else f": {_words(dataclasses.asdict(done.result.resources))}"
    faults = "".join(f"\n    FAULT: {fault}" for fault in faults_of(done))
    of_call = f"\n    of {variant.example}" if faults else ""
    return f"{variant.target.name} {variant.kernel} ({variant.label}){took}, {done.seconds:.1f} s{faults}{of_call}"


def _words(resources: dict[str, int]) -> str:
    return ", ".join(f"{value} {name}" for name, value in resources.items() if value or name == "registers")


def as_json(done: Compiled) -> dict[str, Any]:
    """A variant as the report has it."""
    variant = done.job
    resources = {} if isinstance(done.result, Failure) else dataclasses.asdict(done.result.resources)
    named = {"target": variant.target.name, "kernel": variant.kernel, "variant": variant.label, "example": variant.example}
    return {**named, **resources, "seconds": round(done.seconds, 2), "faults": faults_of(done)}


def table(targets: Sequence[str], results: Iterable[Compiled]) -> str:
    """The most registers of each kernel on each target, with the number of its variants."""
    most: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for done in results:
        if not isinstance(done.result, Failure):
            most[done.job.kernel][done.job.target.name].append(done.result.resources.registers)
    width = max(map(len, most), default=0)
    lines = [f"{'most registers':<{width}}  " + "  ".join(f"{name:>12}" for name in targets)]
    for kernel in sorted(most):
        cells = (f"{max(most[kernel][name])} of {len(most[kernel][name]):>2}" if most[kernel][name] else "" for name in targets)
        lines.append(f"{kernel:<{width}}  " + "  ".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def figures(results: Iterable[Compiled]) -> snapshot.Figures:
    """What the snapshot holds of these."""
    made: dict[str, dict[str, dict[str, tuple[int, int]]]] = defaultdict(lambda: defaultdict(dict))
    for done in results:
        assert isinstance(done.result, Checked)
        resources = done.result.resources
        made[done.job.kernel][done.job.label][done.job.target.name] = resources.registers, resources.shared
    return made


def compare(path: Path, now: snapshot.Figures, *, partial: bool, update: bool) -> int:
    """Hold figures to the snapshot, or write it; 1 if they differ."""
    if update:
        snapshot.write(path, triton.__version__, now)
        print(f"wrote {path}")
        return 0
    version, before = snapshot.read(path)
    if version != triton.__version__:
        print(f"{path} is of Triton {version}, this is {triton.__version__}: registers were not compared.")
        return 0
    changes = list(snapshot.differences(before, now, partial=partial))
    print("\n".join([*changes, f"{len(changes)} differences from {path}"]))
    if changes:
        print("If they are meant, write them down with: nox -s kernels-aot -- --update")
    return 1 if changes else 0


if __name__ == "__main__":
    sys.exit(main())
