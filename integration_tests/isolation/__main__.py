"""Run every case: ``python -m isolation WHEEL…``, with the wheels of all the distributions that the cases name. Exits 1 on problems."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from isolation.cases import CASES, STACK, Case, Report, every_problem, fallbacks
from isolation.environment import Environment

END_TO_END = Path(__file__).with_name("end_to_end.py")


def run(case: Case, wheels: dict[str, Path], folder: Path) -> Report:
    """Make the case's environment, run the model and the doctor in it."""
    environment = Environment(folder / "environment")
    environment.install(*(wheels[name] for name in (*STACK, *case.backends)))
    report = folder / "report.json"
    environment.run(str(END_TO_END), str(report), cwd=folder)
    found: Report = json.loads(report.read_text())
    doctor = environment.command("q-core", "doctor", "--json", expect=case.doctor_exit, cwd=folder)
    return found | {"doctor": json.loads(doctor)}


def main(arguments: list[str]) -> int:
    """Run the cases and print a line for each; returns the exit code."""
    wheels = {path.name.split("-")[0].replace("_", "-"): path.absolute() for path in map(Path, arguments)}
    needed = {*STACK, *(name for case in CASES for name in case.backends)}
    if missing := sorted(needed - set(wheels)):
        print(f"isolation: no wheels of {', '.join(missing)} were given", file=sys.stderr)
        return 2
    failed = False
    for case in CASES:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = run(case, wheels, Path(folder))
        problems = every_problem(case, report)
        failed |= bool(problems)
        served_by = sorted({name or "nobody" for name in report["served_by"].values()})
        print(
            f"{'FAILED' if problems else 'ok':<6}  {case.name:<24} {', '.join(STACK + case.backends)}\n"
            f"        served by {', '.join(served_by)}; the reference stood in, and said so, at {len(fallbacks(report))} ops; "
            f"loss {report['losses'][0]:.3f} → {report['losses'][-1]:.3f}; "
            f"{sum(map(len, report['tokens']))} tokens served; {time.monotonic() - start:.0f} s",
            flush=True,
        )
        for problem in problems:
            print(f"        {problem}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
