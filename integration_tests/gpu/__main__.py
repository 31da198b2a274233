"""``python -m gpu --output FOLDER``: on a machine with a GPU, run what needs one; nothing is fetched from a network.

The packages are built from this tree and installed into build/gpu/environment, on top of the packages of the Python that runs this, which
must have torch with its Triton, setuptools and pip; what else is needed can be brought along as wheels. FOLDER gets results.json, log.txt
with all output, what the benchmark writes, and the tiles that tuning finds. The exit code is 1 if anything didn't pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from gpu.plan import ROOT, USUAL, Setting, jobs
from gpu.running import Result, run_all
from isolation.environment import Environment

NOT_BUILT = {"q-cpu"}
"""Its kernels take a C++ compiler minutes, and serve no GPU."""

SCRATCH = ROOT / "build" / "gpu"
NOT_SOURCES = shutil.ignore_patterns("build", "dist", "tests", "*.egg-info", "*.so", "__pycache__", ".*")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = "separated by commas, each with a part of it after a colon if you like: conformance:gemm_4bit,tests:graphs,bench:gemm"
    processors = os.cpu_count() or 2
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the results")
    parser.add_argument("--steps", default=",".join(USUAL), help=f"{steps} (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="a torch device (default: %(default)s)")
    parser.add_argument("--backend", default="q_cuda", help="that serves it (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="with wheels to install first, without what they require")
    parser.add_argument("--installed", action="store_true", help="install nothing: this Python has the packages")
    parser.add_argument(
        "--within", type=float, default=6 * 3600, metavar="SECONDS", help="for all steps; what is left then isn't run"
    )
    parser.add_argument("--jobs", type=int, default=max(1, processors // 2), help="ops tested at once (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the steps themselves")
    options = parser.parse_args()
    output: Path = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    python = sys.executable if options.installed else str(install(SCRATCH / "environment", options.wheels))
    setting = Setting(python, options.device, options.backend, output, SCRATCH, options.small)
    try:
        planned = jobs(options.steps.split(","), setting)
    except ValueError as error:
        parser.error(str(error))
    environment = {
        "Q_BACKENDS": f"{options.backend},reference",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "integration_tests"),
        "PYTHONUNBUFFERED": "1",
        "Q_TRITON_CACHE": str(output / "tiles"),
    }
    left = options.within - (time.monotonic() - began)
    results: list[Result] = []
    for result in run_all(
        planned, python=python, environment=environment, log=output / "log.txt", at_once=options.jobs, within=left
    ):
        results.append(result)
        print(f"{result.name}: {result.status} in {result.seconds} s", *result.tail, sep="\n    ", flush=True)
        (output / "results.json").write_text(json.dumps([asdict(each) for each in results], indent=1, ensure_ascii=False) + "\n")
    print(f"\n{table(results)}")
    return 0 if all(result.status == "passed" for result in results) else 1


def install(folder: Path, wheels: Path | None) -> Path:
    """Make an environment with the packages of this tree; its Python.

    Raises:
        RuntimeError: a package can't be built or installed; the message holds pip's output.
    """
    environment = Environment(folder)
    if wheels is not None:
        environment.install(*sorted(wheels.glob("*.whl")), check=False)
    with tempfile.TemporaryDirectory() as copies:
        # Copies, so that building leaves nothing in the tree.
        for source in sorted(path.parent for path in ROOT.glob("*/q-*/pyproject.toml") if path.parent.name not in NOT_BUILT):
            shutil.copytree(source, Path(copies) / source.name, ignore=NOT_SOURCES)
        environment.install(*sorted(Path(copies).iterdir()), check=False)
    return environment.python


def table(results: list[Result]) -> str:
    """The results, a line each."""
    width = max((len(result.name) for result in results), default=0)
    return "\n".join(f"{r.name:<{width}}  {r.status:<9}  {r.seconds:>6.1f} s  {r.summary[:90]}" for r in results)


if __name__ == "__main__":
    sys.exit(main())
