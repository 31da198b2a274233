"""``python -m benchmarks``: measure, print as it goes, write JSON, and on request pages of the documentation."""

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
from benchmarks.cases import FAMILIES, MODULES
from benchmarks.clock import Yardstick
from benchmarks.record import Record, measure
from pages import write_between
from q_core import explain


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="measure these only")
    parser.add_argument("--match", default="", help="measure what has this in its name or shape only")
    parser.add_argument("--threads", type=int, action="append", help="default: 1, and all")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument(
        "--pages", type=Path, metavar="FOLDER", help="write the pages of documentation: cpu.md of all ops, q-nn.md of modules"
    )
    parser.add_argument("--readme", type=Path, help="a Markdown file whose table of the modules' speed to write anew")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")
    arguments = parser.parse_args()
    families = arguments.family or list(FAMILIES)
    all_ops, modules = set(FAMILIES) - {MODULES} <= set(families), MODULES in families
    if (arguments.pages or arguments.readme) and (arguments.match or arguments.threads or not (all_ops or modules)):
        parser.error(f"--pages and --readme are for all ops, or for the family {MODULES}, without --match and --threads")
    if arguments.readme and not modules:
        parser.error(f"--readme is for the family {MODULES}")

    threads = arguments.threads or sorted({1, os.cpu_count() or 1})
    machine = [_machine()]
    of_ops: list[Record] = []
    of_modules: list[Record] = []
    with torch.inference_mode():
        yardsticks = {}
        for count in threads:
            torch.set_num_threads(count)
            yardsticks[count] = Yardstick()
            machine.append(f"{count} thread{'s' * (count > 1)}: read {yardsticks[count].read / 1e9:.1f} GB/s, "
                           f"copy {yardsticks[count].copy / 1e9:.1f} GB/s")  # fmt: skip
        print("\n".join(machine), flush=True)
        for family in families:
            records = of_modules if family == MODULES else of_ops
            for case in _cases(family, arguments.match):
                for count in threads:
                    torch.set_num_threads(count)
                    records.append(measure(case, count, yardsticks[count]))
                    print(" | ".join(report.cells(records[-1])), flush=True)
    report.write_json([*of_ops, *of_modules], arguments.output)
    if arguments.pages:
        arguments.pages.mkdir(parents=True, exist_ok=True)
        if all_ops:
            (arguments.pages / "cpu.md").write_text(report.ops_page(of_ops, machine))
            report.plot(of_ops, arguments.pages / "bench-cpu.png")
        if modules:
            (arguments.pages / "q-nn.md").write_text(report.modules_page(of_modules, machine))
    if arguments.readme:
        write_between(arguments.readme, "speed", report.modules_summary(of_modules))
    held = [record.met for record in (*of_ops, *of_modules)]
    print(f"{len(held)} measurements, {held.count(True)} targets met, {held.count(False)} missed")
    return 1 if arguments.check and False in held else 0


def _cases(family: str, match: str) -> Iterator[Case]:
    torch.manual_seed(0)
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
