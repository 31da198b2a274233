"""What the gate reads off compiled kernels, over kernels that are made to be at fault, and over the compilers' words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from q_triton.aot.gate import SHARED_BYTES, Checked, check, faults_of, wants_matrix_instructions
from q_triton.aot.resources import Resources
from q_triton.aot.variants import Variant, label_of
from q_triton.launch import Launch
from q_triton.targets import target_named
from q_triton.tiles import tile

FINE = Resources(registers=32, spilled=0, local=0, shared=1024, matrix=0)
BF16_DOT = (
    "    %1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x32xbf16> * tensor<32x16xbf16> -> tensor<16x16xf32> loc(#loc1)"
)
F32_DOT = "    %1 = tt.dot %a, %b, %c : tensor<16x32xf32> * tensor<32x16xf32> -> tensor<16x16xf32> loc(#loc1)"
TF32_DOT = (
    "    %1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x32xf32> * tensor<32x16xf32> -> tensor<16x16xf32> loc(#loc1)"
)
INT8_DOT = "    %1 = tt.dot %a, %b, %c : tensor<16x32xi8> * tensor<32x16xi8> -> tensor<16x16xi32> loc(#loc1)"


@pytest.mark.parametrize(
    ("ttir", "wanted"),
    [(BF16_DOT, True), (INT8_DOT, True), (TF32_DOT, True), (F32_DOT, False), ("", False), (F32_DOT + "\n" + BF16_DOT, True)],
)
def test_which_dots_want_matrix_instructions(ttir: str, wanted: bool) -> None:
    assert wants_matrix_instructions(ttir) == wanted


@pytest.mark.parametrize(
    ("changes", "ttir", "fault"),
    [
        ({"spilled": 3}, "", "3 registers spill"),
        ({"local": 16}, "", "16 bytes of local memory a thread"),
        ({"shared": 2049}, "", "2049 bytes of shared memory, 2048 are there"),
        ({}, BF16_DOT, "a dot without matrix instructions"),
        ({}, "%1 = tt.atomic_rmw fadd, acq_rel, gpu, %p, %v, %m : (...)", "an atomic sum of floats: another result each time"),
    ],
)
def test_faults(changes: dict[str, int], ttir: str, fault: str) -> None:
    values = {name: getattr(FINE, name) for name in FINE.__slots__} | changes
    assert list(faults_of(Resources(**values), ttir, 2048)) == [fault]


@pytest.mark.parametrize(("matrix", "ttir"), [(0, ""), (8, BF16_DOT), (0, F32_DOT), (0, "tt.atomic_rmw add, acq_rel, gpu, %p")])
def test_no_faults(matrix: int, ttir: str) -> None:
    assert not list(faults_of(Resources(32, 0, 0, 2048, matrix), ttir, 2048))


@triton.jit
def dot_kernel(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@triton.jit
def center_kernel(x, N: tl.constexpr):
    value = tl.load(x + tl.arange(0, N))
    tl.store(x + tl.arange(0, N), value - tl.sum(value) / N)


@triton.jit
def add_up_kernel(x, out):
    tl.atomic_add(out, tl.load(x))


def checked(kernel: Any, target: str, blocks: dict[str, int], **arguments: Any) -> Checked:
    made = Launch(kernel, (1,), tile(warps=1, **blocks), False, arguments)
    there = target_named(target)
    return check(Variant(there, kernel.__name__, label_of(made, there), "a test", made))


def square(N: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(N, N, dtype=dtype, device="meta")


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_a_dot_has_matrix_instructions_on_every_target(target: str) -> None:
    a, out = square(32, torch.bfloat16), square(32, torch.float32)
    found = checked(dot_kernel, target, {"N": 32}, a=a, b=a, out=out)
    assert not found.faults
    assert found.resources.matrix > 0
    assert found.resources.registers > 16


@pytest.mark.parametrize("target", ["sm_80", "gfx1100"])
def test_a_tile_that_is_too_large_is_found(target: str) -> None:
    x = torch.empty(16384, dtype=torch.float32, device="meta")
    found = checked(center_kernel, target, {"N": 16384}, x=x)  # of one warp: 512 values a thread
    assert found.resources.spilled > 0
    assert found.resources.local > 0
    assert len(found.faults) == 2


def test_atomic_sums_of_floats_are_found_and_of_integers_allowed() -> None:
    for dtype, faults in ((torch.float32, 1), (torch.int32, 0)):
        x = square(1, dtype)
        assert len(checked(add_up_kernel, "sm_90", {}, x=x, out=x).faults) == faults


def test_labels_tell_types_constants_and_tile() -> None:
    a, out = square(32, torch.bfloat16), square(32, torch.float32)
    made = Launch(dot_kernel, (1,), tile(N=32, warps=2, stages=3), True, {"a": a, "b": a, "out": out})
    assert label_of(made, target_named("sm_90")) == "2 bf16 fp32; N=32; 2 warps 3 stages exact"
