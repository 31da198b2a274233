"""From a launch that was recorded to machine code for a target; needs no driver."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from q_triton.launch import Launch
from q_triton.targets import Target

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*u1",
}
_ALIGNED = [["tt.divisibility", 16]]
_BELOW_2GB = [["tt.pointer_range", 32]]  # AMD's loads through buffers take offsets of 32 bits


def compiler_target(target: Target) -> GPUTarget:
    """The target in Triton's words.

    Raises:
        ValueError: it is one of a vendor whose compiler Triton's wheels don't have.
    """
    if target.platform == "cuda":
        return GPUTarget("cuda", target.capability, 32)
    if target.platform == "rocm":
        return GPUTarget("hip", target.name, 64 if target.name.startswith("gfx9") else 32)
    raise ValueError(f"no compiler for {target.name} is at hand, expected one of NVIDIA's or AMD's targets.")


def source_of(launch: Launch, target: Target) -> ASTSource:
    """A launch's kernel with the types of its arguments, specialized as a call would be: on 1, on multiples of 16, on constants."""
    typed = _Typed(target)
    given = launch.given
    signature = {parameter.name: typed.of(given[parameter.name], parameter, (parameter.num,)) for parameter in launch.kernel.params}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=typed.constants, attrs=typed.attributes)


class _Typed:
    """The types of a kernel's arguments, and what is known of them besides, by their places: of a tuple's items these are paths."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}

    def of(self, value: Any, parameter: Any, place: tuple[int, ...]) -> Any:
        if isinstance(value, tuple) and not parameter.is_constexpr:
            types = (self.of(item, parameter, (*place, i)) for i, item in enumerate(value))
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        specialized = not parameter.do_not_specialize or len(place) > 1  # Triton asks of no item of a tuple
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized):
            self.constants[place] = value
            return "constexpr"
        if isinstance(value, Tensor):
            self.attributes[place] = _of_pointer(value, self._target)
            return _POINTERS[value.dtype]
        if isinstance(value, bool):
            return "u1"
        if isinstance(value, int):
            if value % 16 == 0 and specialized:
                self.attributes[place] = _ALIGNED
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"


def _of_pointer(tensor: Tensor, target: Target) -> list[list[Any]]:
    # torch's memory is aligned; within it a view may begin anywhere.
    aligned = tensor.storage_offset() * tensor.element_size() % 16 == 0
    small = target.platform == "rocm" and tensor.untyped_storage().nbytes() < 2**31
    return _ALIGNED * aligned + _BELOW_2GB * small


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compile a recorded launch for a target: Triton's compiled kernel, with its code in ``asm``."""
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, "enable_fp_fusion": not launch.exact}
    return triton.compile(source_of(launch, target), target=compiler_target(target), options=options)
