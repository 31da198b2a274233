"""What a compiled kernel has to hold on every target."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from q_triton.aot.compiling import compile_launch
from q_triton.aot.resources import Resources, resources_of
from q_triton.aot.variants import Variant

LIMIT_S = 60.0
"""Longest that a kernel may take to compile: whoever calls it first waits for that."""

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx1100": 64 << 10}
"""Shared memory that a program can have, by target; the compiler doesn't check it.

Of NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability, "Maximum amount of shared memory per thread
block". Of AMD: the instruction set architecture guides of CDNA 2, CDNA 3 and RDNA 3, LDS of a work-group.
"""


@dataclass(frozen=True, slots=True)
class Checked:
    """A variant that was compiled.

    Attributes:
        resources: what it takes.
        faults: what it doesn't hold, in words.
    """

    resources: Resources
    faults: tuple[str, ...]


def check(variant: Variant) -> Checked:
    """Compile a variant and look at what came out."""
    compiled = compile_launch(variant.launch, variant.target)
    resources = resources_of(compiled, variant.target)
    return Checked(resources, tuple(faults_of(resources, compiled.asm["ttir"], SHARED_BYTES[variant.target.name])))


def faults_of(resources: Resources, ttir: str, shared_bytes: int) -> Iterator[str]:
    """What is wrong with a kernel.

    Args:
        resources: what it takes.
        ttir: it, in Triton's own intermediate representation.
        shared_bytes: the target's shared memory.
    """
    if resources.spilled:
        yield f"{resources.spilled} registers spill"
    if resources.local:
        yield f"{resources.local} bytes of local memory a thread"
    if resources.shared > shared_bytes:
        yield f"{resources.shared} bytes of shared memory, {shared_bytes} are there"
    if wants_matrix_instructions(ttir) and not resources.matrix:
        yield "a dot without matrix instructions"
    if re.search(r"\batomic_rmw fadd\b", ttir):
        yield "an atomic sum of floats: another result each time"


def wants_matrix_instructions(ttir: str) -> bool:
    """Whether a kernel has a dot that every target has instructions for: any but one of float32 operands that keeps their precision."""
    dots = re.findall(r"\btt\.dot(?:_scaled)? (.*?): tensor<[\dx]+x(\w+)", ttir)
    return any(kind != "f32" or "tf32" in options for options, kind in dots)
