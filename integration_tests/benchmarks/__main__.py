"""``python -m benchmarks``: measure, print as it goes, write JSON, and on request the page of the documentation."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.case import Case
from benchmarks.cases import FAMILIES
from benchmarks.clock import Yardstick
from benchmarks.record import measure
from q_core import explain


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="measure these only")
    parser.add_argument("--match", default="", help="measure what has this in its name or shape only")
    parser.add_argument("--threads", type=int, action="append", help="default: 1, and all")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--page", type=Path, help="write a page of documentation, and its plot beside it")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")
    arguments = parser.parse_args()
    if arguments.page and (arguments.family or arguments.match or arguments.threads):
        parser.error("--page is for a whole run, without --family, --match and --threads")

    threads = arguments.threads or sorted({1, os.cpu_count() or 1})
    records, machine = [], [_machine()]
    with torch.inference_mode():
        yardsticks = {}
        for count in threads:
            torch.set_num_threads(count)
            yardsticks[count] = Yardstick()
            machine.append(f"{count} thread{'s' * (count > 1)}: read {yardsticks[count].read / 1e9:.1f} GB/s, "
                           f"copy {yardsticks[count].copy / 1e9:.1f} GB/s")  # fmt: skip
        print("\n".join(machine), flush=True)
        for case in _cases(arguments.family or list(FAMILIES), arguments.match):
            for count in threads:
                torch.set_num_threads(count)
                records.append(measure(case, count, yardsticks[count]))
                print(" | ".join(report.cells(records[-1])), flush=True)
    report.write_json(records, arguments.output)
    if arguments.page:
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(report.markdown(records, machine))
        report.plot(records, arguments.page.with_name("bench-cpu.png"))
    missed = [record for record in records if record.met is False]
    print(f"{len(records)} measurements, {sum(record.met is True for record in records)} targets met, {len(missed)} missed")
    return 1 if arguments.check and missed else 0


def _cases(families: list[str], match: str) -> Iterator[Case]:
    torch.manual_seed(0)
    for family in families:
        for case in FAMILIES[family]():
            if match in f"{case.op} {case.shape}":
                yield case


def _machine() -> str:
    served = explain("gemm_4bit", device="cpu").served_by
    described = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in described if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores; torch {torch.__version__}; gemm_4bit is served by {served}"


if __name__ == "__main__":
    sys.exit(main())
