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
    torch.bool: "*i1",
}
_ALIGNED = [["tt.divisibility", 16]]


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


def source_of(launch: Launch) -> ASTSource:
    """A launch's kernel with the types of its arguments, specialized as a call would be: on 1, on multiples of 16, on constants."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def typed(value: Any, place: tuple[int, ...], parameter: Any) -> Any:
        """A value's type in Triton's words; what it is known for besides goes to the other two."""
        if isinstance(value, tuple) and not parameter.is_constexpr:
            types = [typed(part, (*place, i), parameter) for i, part in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            constants[place] = value
            return "constexpr"
        if isinstance(value, Tensor):
            attributes[place] = _ALIGNED  # torch's memory is; a view's offset may not be, and makes another kernel
            return _POINTERS[value.dtype]
        if isinstance(value, bool):
            return "u1"
        if isinstance(value, int):
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[place] = _ALIGNED
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    given = {**launch.arguments, **launch.tile.blocks}
    for parameter in launch.kernel.params:
        signature[parameter.name] = typed(given[parameter.name], (parameter.num,), parameter)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compile a recorded launch for a target: Triton's compiled kernel, with its code in ``asm``."""
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, "enable_fp_fusion": not launch.exact}
    return triton.compile(source_of(launch), target=compiler_target(target), options=options)
