"""What Triton's interpreter gets wrong, mended, so that what it shows holds on a GPU.

Of bfloat16 it knows the bits alone: it truncates where a GPU rounds, and it multiplies, adds and compares the bits as integers. A GPU's
maximum and minimum of a number and NaN is the number, numpy's is NaN. Seen in Triton 3.6 to 3.9. What is patched are its private names, so
:func:`install` refuses an interpreter that lacks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

_ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_fabs")
_FROM_INTEGER = ("create_si_to_fp", "create_ui_to_fp")


def widened(bits: NDArray[Any]) -> NDArray[np.float32]:
    """bfloat16 bits as float32."""
    wide = np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(bits.shape)


def narrowed(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 as bfloat16 bits, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bfloat16(handle: object) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _convert(convert: Callable[..., Any]) -> Callable[..., Any]:
    def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return narrowed(data)
        if source == tl.bfloat16 and target == tl.float32:
            return widened(data)
        return convert(data, source, target, rounding_mode)

    return convert_float


def _dot(dot: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if not _is_bfloat16(a):
            return dot(self, a, b, d, *options)
        if d.dtype.scalar != tl.float32:
            raise TypeError(f"a dot of bfloat16 adds up in {d.dtype.scalar} here, expected float32.")
        return interpreter.TensorHandle(np.matmul(widened(a.data), widened(b.data)) + d.data, tl.float32)

    return create_dot


def _refusing(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    def refuse_bfloat16(self: Any, *operands: Any, **options: Any) -> Any:
        if any(map(_is_bfloat16, operands)):
            raise TypeError(f"{name} of bfloat16 in a kernel: convert to float32 where it is loaded.")
        return operation(self, *operands, **options)

    return refuse_bfloat16


def _not_to_bfloat16(convert: Callable[..., Any]) -> Callable[..., Any]:
    def refuse_bfloat16(self: Any, handle: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16:
            raise TypeError("an integer is made bfloat16 in a kernel: convert it to float32 first.")
        return convert(self, handle, target)

    return refuse_bfloat16


def _no_bfloat16_in(check: Callable[..., None]) -> Callable[..., None]:
    def refuse_bfloat16(self: Any, tensors: tuple[Any, ...]) -> None:
        check(self, tensors)
        if any(_is_bfloat16(tensor.handle) for tensor in tensors):
            raise TypeError("a reduction or scan of bfloat16 in a kernel: convert to float32 where it is loaded.")

    return refuse_bfloat16


def _patched_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """A helper is called as it is: what its first call patches stays, and to patch it again takes longer than most helpers."""
    patched: set[Callable[..., Any]] = set()

    def call_helper(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.fn in patched:
            return self.rewrite()(*arguments, **options)
        patched.add(self.fn)
        return call(self, *arguments, **options)

    return call_helper


def install() -> None:
    """Mend the interpreter of this process; a second call changes nothing.

    Raises:
        RuntimeError: this Triton's interpreter isn't built as those that it was written for.
    """
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "q_mended", False):
        return
    needed = (*_ARITHMETIC, *_FROM_INTEGER, "create_dot", "create_maxnumf", "create_minnumf")
    missing = [name for name in needed if not hasattr(builder, name)]
    missing += [name for name in ("_convert_float", "ReduceScanOpInterface") if not hasattr(interpreter, name)]
    if missing:
        import triton

        raise RuntimeError(
            f"Triton {triton.__version__}'s interpreter has no {', '.join(missing)}: q_triton can't mend its bfloat16."
        )
    interpreter._convert_float = _convert(interpreter._convert_float)
    reductions = interpreter.ReduceScanOpInterface
    reductions.check_tensor = _no_bfloat16_in(reductions.check_tensor)
    builder.create_dot = _dot(builder.create_dot)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    for name in _ARITHMETIC:
        setattr(builder, name, _refusing(name, getattr(builder, name)))
    for name in _FROM_INTEGER:
        setattr(builder, name, _not_to_bfloat16(getattr(builder, name)))
    interpreter.InterpretedFunction.__call__ = _patched_once(interpreter.InterpretedFunction.__call__)
    builder.q_mended = True
