"""The built library: no instruction that a machine may lack outside its ISA level, and nothing brought along but itself."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from q_cpu.runtime import native

LIBRARY = str(native.__file__)

x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="has the baseline level alone")
binutils = pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")

SEGMENTS_AND_SIZE = {"26", "2e", "36", "3e", "64", "65", "67"}
REPEATS_AND_SIZE = {"66", "f2", "f3"}


def functions() -> Iterator[tuple[str, list[tuple[list[str], str]]]]:
    """Each function's mangled name, and its instructions as bytes and text."""
    text = subprocess.run(["objdump", "--disassemble", "--wide", LIBRARY], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"^[0-9a-f]+ <", text, flags=re.MULTILINE)[1:]:
        name, _, lines = part.partition(">:\n")
        rows = (line.split("\t") for line in lines.splitlines())
        yield name, [(row[1].split(), row[2]) for row in rows if len(row) == 3]


def level_of(mangled: str) -> str:
    """The ISA level whose namespace a function is in; of all others, the baseline."""
    found = re.search(r"5q_cpu(?:4(avx2)|6(avx512))", mangled)
    return next(filter(None, found.groups())) if found else "baseline"


def needs(code: list[str], text: str) -> str:
    """The plainest level that has an instruction, by its encoding."""
    first = next(i for i, byte in enumerate(code) if byte not in SEGMENTS_AND_SIZE)
    if code[first] == "62":  # EVEX
        return "avx512"
    if code[first] in ("c4", "c5"):  # VEX, which mask registers and BMI have too
        return "avx2" if text.startswith("v") else "avx512"
    opcode = [byte for byte in code[first:] if byte not in REPEATS_AND_SIZE and not "40" <= byte <= "4f"]
    # SSSE3, SSE4 and later. TZCNT is what BSF with a prefix is called: older machines take it for that, and compilers count on it.
    if opcode[:2] in (["0f", "38"], ["0f", "3a"]) or text.startswith(("popcnt", "lzcnt")):
        return "avx2"
    return "baseline"


@x86
@binutils
def test_no_function_has_an_instruction_of_a_wider_level():
    """Among them are the inline functions that several sources share, of which the linker keeps one, and what runs as it loads."""
    order = ["baseline", "avx2", "avx512"]
    widest = dict.fromkeys(order, "baseline")
    for name, instructions in functions():
        own = level_of(name)
        for code, text in instructions:
            if widest[own] == order[-1]:  # has been seen, and may be
                break
            needed = needs(code, text)
            assert order.index(needed) <= order.index(own), f"{name}, of level {own}, has {text.strip()!r}"
            widest[own] = max(widest[own], needed, key=order.index)
    assert widest == {level: level for level in order}  # the wider levels were seen and told apart


@binutils
def test_the_library_links_the_c_and_cpp_runtimes_alone():
    headers = subprocess.run(["objdump", "--private-headers", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = {name.split(".so")[0] for name in re.findall(r"NEEDED\s+(\S+)", headers)}
    sanitizers = {"libasan", "libubsan"}  # of nox -s sanitize
    assert "libc" in needed
    assert needed - sanitizers <= {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_process_with_torch_gets_one_library_more():
    """And its loops run on the OpenMP runtime that torch brought."""
    code = """
import torch
def libraries():
    lines = (line.split(maxsplit=5) for line in open("/proc/self/maps"))
    return {fields[5].strip() for fields in lines if len(fields) == 6 and ".so" in fields[5]}
torch.set_num_threads(2)
torch.ones(1 << 20).sum()
before = libraries()
from q_cpu import quantize
quantize.quantize_4bit(torch.ones(1 << 20), 64, "nf4")
print(*(libraries() - before), sep="\\n")
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert completed.returncode == 0, completed.stderr
    python_and_sanitizer = re.compile("/lib-dynload/|/libasan|/libubsan")
    brought = [path for path in completed.stdout.split("\n") if path and not python_and_sanitizer.search(path)]
    assert brought == [LIBRARY]
