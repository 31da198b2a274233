"""The program that ``nox -s aarch64`` builds fits the kernels' headers: it is compiled rarely, and they change often."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

Q_CPU = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_driver_fits_the_headers():
    command = ["g++", "-std=c++17", "-fsyntax-only", "-DQ_CPU_LEVEL=baseline", "-I", "csrc/kernels", "tests/native/digests.cpp"]
    completed = subprocess.run(command, cwd=Q_CPU, capture_output=True, text=True, timeout=120, check=False)
    assert completed.returncode == 0, completed.stderr
