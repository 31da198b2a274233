"""Launches that are recorded and compiled without a driver are specialized as Triton itself would specialize the call."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from q_triton.aot.compiling import compile_launch, compiler_target, source_of
from q_triton.aot.gate import SHARED_BYTES
from q_triton.aot.variants import variants
from q_triton.launch import Launch, launch, recorded
from q_triton.targets import Target, target_named
from q_triton.tiles import tile

SM_90, GFX942 = target_named("sm_90"), target_named("gfx942")


@triton.jit(do_not_specialize=["T"])
def scale_kernel(x, bias, out, T, N, stride, factor, flag, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at * stride, at < T * N, 0.0).to(tl.float32) * factor
    if ADD:
        value += tl.load(bias + at, at < T * N, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), (at < T * N) & flag)


def triton_would(made: Launch, target: GPUTarget) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and attributes by which Triton's own call would compile a kernel."""
    kernel: JITFunction[Any] = made.kernel
    backend = make_backend(target)
    options = {"num_warps": made.tile.warps, "num_stages": made.tile.stages, "enable_fp_fusion": not made.exact}
    bound, specialization, given = create_function_from_signature(kernel.signature, kernel.params, backend)(**made.given, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    return signature, constants, attributes


def assert_as_triton_would(made: Launch, target: Target) -> None:
    source = source_of(made, target)
    signature, constants, attributes = triton_would(made, compiler_target(target))
    assert source.signature == signature
    assert source.constants == constants
    assert {place: value for place, value in source.attrs.items() if value} == {p: v for p, v in attributes.items() if v}


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> Tensor:
    return torch.empty(offset + torch.Size(shape).numel(), dtype=dtype)[offset:].view(shape)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ones": {"T": 1, "N": 1, "stride": 1},
    "multiples of 16": {"T": 32, "N": 4096, "stride": 48},
    "zero": {"N": 0},
    "negative": {"stride": -16},
    "wide": {"N": 2**31, "stride": 2**40 + 1, "T": 2**33},
    "nothing": {"bias": None, "ADD": False},
    "misaligned view": {"x": tensor(64, offset=1)},
    "aligned view": {"x": tensor(64, offset=8)},
    "other dtypes": {
        "x": tensor(64, dtype=torch.float16),
        "bias": tensor(64, dtype=torch.uint8),
        "out": tensor(64, dtype=torch.int8),
    },
    "integers": {"x": tensor(64, dtype=torch.int64), "bias": tensor(64, dtype=torch.int32), "out": tensor(64, dtype=torch.int16)},
    "flags": {"x": tensor(64, dtype=torch.bool), "flag": False},
    "a whole float": {"factor": 1.0},
}


class Settings(NamedTuple):
    first: float
    second: float


@triton.jit(do_not_specialize=["starts"])
def several_kernel(xs, h, starts, counts, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(xs[0] + at, tl.load(xs[1] + at) * h.first + starts[0] + counts[1])


def recording(arguments: dict[str, Any]) -> Launch:
    seen: list[Launch] = []
    usual = {
        "x": tensor(64), "bias": tensor(64, dtype=torch.float32), "out": tensor(64), "T": 7, "N": 9, "stride": 3, "factor": 0.5,
        "flag": True, "ADD": True,
    }  # fmt: skip
    with recorded(seen.append):
        launch(scale_kernel, (3,), tile(BLOCK=64, warps=2), exact=True, **{**usual, **arguments})
    (made,) = seen
    return made


@pytest.mark.parametrize("target", [SM_90, GFX942], ids=lambda target: target.name)
@pytest.mark.parametrize("name", CALLS)
def test_specialized_as_triton_would(name: str, target: Target) -> None:
    assert_as_triton_would(recording(CALLS[name]), target)


@pytest.mark.parametrize("target", [SM_90, GFX942], ids=lambda target: target.name)
def test_tuples_are_specialized_item_by_item(target: Target) -> None:
    seen: list[Launch] = []
    xs = (tensor(64), tensor(64, dtype=torch.float32, offset=1), tensor(64))
    with recorded(seen.append):
        launch(several_kernel, (1,), tile(N=64), xs=xs, h=Settings(0.5, 1.0), starts=(0, 1, 16), counts=(1, 5, 32))
    assert_as_triton_would(seen[0], target)


def test_more_than_two_gigabytes_are_another_kernel_on_amd() -> None:
    large = torch.empty(2**31, dtype=torch.int8, device="meta")
    seen = recording({"x": large})
    assert ["tt.pointer_range", 32] not in source_of(seen, GFX942).attrs[0,]
    assert ["tt.pointer_range", 32] in source_of(seen, GFX942).attrs[1,]


@pytest.mark.parametrize("name", SHARED_BYTES)
def test_every_recorded_launch_is_specialized_as_triton_would(name: str) -> None:
    target = target_named(name)
    made = variants(target)
    assert made
    for variant in made:
        assert_as_triton_would(variant.launch, target)


def test_options_reach_the_compiler() -> None:
    compiled = compile_launch(recording({}), SM_90)
    assert compiled.metadata.num_warps == 2
    assert compiled.metadata.enable_fp_fusion is False
    assert ".target sm_90" in compiled.asm["ptx"]


def test_intels_compiler_is_not_at_hand() -> None:
    with pytest.raises(ValueError, match="no compiler for xe is at hand"):
        compiler_target(target_named("xe"))
