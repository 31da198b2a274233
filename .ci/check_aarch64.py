"""Compile q-cpu's baseline kernels for aarch64 and for this machine, run both, and compare: ``python check_aarch64.py FOLDER``.

The first runs under qemu's user emulation. Needs Debian's g++-aarch64-linux-gnu and qemu-user, or what they are called elsewhere; and a
Python with pybind11 and setuptools, for setup.py, which has the compiler's flags.
"""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

Q_CPU = Path(__file__).parents[1] / "backends" / "q-cpu"
COMPILERS = {"aarch64": ("aarch64-linux-gnu-g++", "-static"), platform.machine(): ("g++",)}
EMULATORS = {"aarch64": ("qemu-aarch64",)}


def main(folder: Path) -> int:
    folder = folder.absolute()
    os.chdir(Q_CPU)  # setup.py's paths are relative
    settings = runpy.run_path("setup.py")
    outputs = {machine: run(build(machine, settings, folder), machine) for machine in COMPILERS}
    lines = [output.splitlines() for output in outputs.values()]
    differing = [pair for pair in zip(*lines, strict=True) if len(set(pair)) > 1]
    print("\n".join(map(str, differing)) or f"{len(lines[0])} outputs are the same on {' and '.join(outputs)}")
    return 1 if differing else 0


def build(machine: str, settings: dict[str, Any], folder: Path) -> Path:
    """The program tests/native/digests.cpp, with the kernels at their baseline level and no other."""
    program = folder / f"digests-{machine}"
    level = ("-DQ_CPU_LEVEL=baseline", '-DQ_CPU_LEVEL_NAME="baseline"', '-DQ_CPU_LEVEL_DISPLAY="baseline"')
    sources = [*settings["LEVEL_SOURCES"], str(settings["KERNELS"] / "code_book.cpp"), "tests/native/digests.cpp"]
    command = [*COMPILERS[machine], *settings["KERNEL_FLAGS"], *level, f"-I{settings['KERNELS']}", *sources]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def run(program: Path, machine: str) -> str:
    emulator = EMULATORS.get(machine, ()) if machine != platform.machine() else ()
    return subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
