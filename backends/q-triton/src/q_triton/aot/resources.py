"""What a compiled kernel takes of a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from q_triton.targets import Target

_NVIDIA_MATRIX = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")
_AMD_MATRIX = ("v_mfma", "v_smfmac", "v_wmma")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel on one target.

    Attributes:
        registers: vector registers of a thread.
        spilled: registers that don't fit, counted in stores and loads (NVIDIA) or registers (AMD).
        local: bytes of a thread's memory off the chip: its stack and arrays.
        shared: bytes of shared memory (AMD: LDS) of a program.
        matrix: matrix instructions in the code.
    """

    registers: int
    spilled: int
    local: int
    shared: int
    matrix: int


def resources_of(compiled: Any, target: Target) -> Resources:
    """Read a compiled kernel's resources off its machine code; shared memory, which is given at the launch, off the compiler's account."""
    shared = compiled.metadata.shared
    return _nvidia(compiled.asm["cubin"], shared) if target.platform == "cuda" else _amd(compiled.asm["amdgcn"], shared)


def _nvidia(cubin: bytes, shared: int) -> Resources:
    dump = _cuobjdump(cubin)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return Resources(
        registers=used["REG"],
        spilled=len(re.findall(r"\b(?:LDL|STL)\b", dump)),
        local=used["STACK"] + used["LOCAL"],
        shared=shared,
        matrix=sum(len(re.findall(rf"\b{name}\b", dump)) for name in _NVIDIA_MATRIX),
    )


def _cuobjdump(cubin: bytes) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(program), "--dump-resource-usage", "--dump-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


def _amd(assembly: str, shared: int) -> Resources:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"the compiler's metadata has no {name}"
        return int(found[1])

    return Resources(
        registers=field("vgpr_count"),
        spilled=field("vgpr_spill_count"),
        local=field("private_segment_fixed_size"),
        shared=shared + field("group_segment_fixed_size"),
        matrix=sum(len(re.findall(rf"\b{name}", assembly)) for name in _AMD_MATRIX),
    )
