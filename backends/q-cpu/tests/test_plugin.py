"""What the backend says of itself, the choice of the ISA level, and what the kernel sources may not do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from q_core.backend import ENTRY_POINT_GROUP
from q_cpu import plugin
from q_cpu.runtime import native

KERNELS = Path(__file__).parent.parent / "csrc" / "kernels"


def run(code: str, isa: str = "") -> str:
    """The output of a fresh interpreter with Q_CPU_ISA set."""
    environment = {**os.environ, "Q_CPU_ISA": isa}
    completed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


PROBE = "from q_cpu.plugin import probe; found = probe(); print(found.available, found.reason)"


def test_the_entry_point_is_the_backend():
    (found,) = entry_points(group=ENTRY_POINT_GROUP, name="q_cpu")
    assert found.load() is plugin.backend
    assert plugin.backend.device_types == ("cpu",)


def test_the_plugin_is_cheap_to_import_and_then_chooses_the_widest_level():
    code = """
import sys, q_cpu.plugin
print(sorted(m for m in sys.modules if m.startswith("q_cpu")))
from q_cpu.runtime import native
print(native.isa() == native.available_isas()[-1])
"""
    loaded, widest = run(code).splitlines()
    assert loaded == "['q_cpu', 'q_cpu.plugin']"
    assert widest == "True"


def test_the_probe_says_level_and_threads():
    assert plugin.probe().available
    assert re.fullmatch(r"(AVX-512|AVX2|baseline), \d+ threads? shared with torch", plugin.probe().reason)


@pytest.mark.parametrize("isa", native.available_isas())
def test_the_environment_forces_a_level(isa):
    display = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512"}[isa]
    assert run(PROBE, isa).startswith(f"True {display}, ")


def test_an_unknown_level_makes_the_backend_unavailable():
    reason = run(PROBE, "avx1024")
    assert reason.startswith("False Q_CPU_ISA=avx1024: ISA level 'avx1024' is unknown, expected one of baseline")


def test_a_level_that_the_machine_lacks_makes_the_backend_unavailable():
    lacking = {"avx2", "avx512"} - set(native.available_isas())
    if not lacking:
        pytest.skip("this machine has every level")
    reason = run(PROBE, lacking.pop())
    assert reason.startswith("False Q_CPU_ISA=")


def test_4bit_books_are_checked():
    for values, ordered, message in (
        ([0.0] * 15, [0, 1], "values has 15 entries, expected 16"),
        ([0.0] * 16, [0], "ordered has 1 codes, expected 2 to 16"),
        ([0.0] * 16, [0, 16], "ordered has the code 16, expected 0 to 15"),
    ):
        with pytest.raises(ValueError, match=f"register_4bit: {message}"):
            native.register_4bit("broken", values, ordered)


@pytest.mark.parametrize(
    "source", ["quantize.cpp", "gemm.cpp", "optim.cpp", "attention.cpp", "kv_cache.cpp", "norm.cpp", "table.cpp"]
)
def test_sources_compiled_once_a_level_include_no_std(source):
    """An inline function of std compiled with AVX flags could be the copy that the linker keeps for the baseline."""
    allowed = {"stddef.h", "stdint.h", "string.h", "immintrin.h"}
    pending, seen = [source], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        text = (KERNELS / name).read_text()
        assert set(re.findall(r"#include <(.+)>", text)) <= allowed
        pending += re.findall(r'#include "(.+)"', text)
