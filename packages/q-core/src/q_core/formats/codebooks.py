"""Code books: the values that codes stand for.

Books are plain tuples; :func:`book_tensor` and :func:`dynamic_map` put them on a device once and keep them, so that a model of a
thousand quantized tensors holds one copy.
"""

from __future__ import annotations

import functools
import itertools
import struct
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

FourBitType = Literal["nf4", "fp4", "int4", "mxfp4", "nvfp4"]

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""4-bit NormalFloat (QLoRA, arXiv 2305.14314), by code."""

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(x / 12 for x in _FP4_TWELFTHS) + tuple(-x / 12 for x in _FP4_TWELFTHS)
"""bitsandbytes' FP4, by code: sign, then a magnitude that is not in order. Codes 0 and 8 both mean zero. Not OCP E2M1."""


INT4 = tuple((code - 8) / 7 for code in range(16))
"""Integers -8…7, offset by 8, in sevenths; -8 is decoded and never made."""

_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = tuple(x / 6 for x in _E2M1_MAGNITUDES) + tuple(-x / 6 for x in _E2M1_MAGNITUDES)
"""OCP's 4-bit float (Microscaling Formats 1.0), by code, in sixths; codes 0 and 8 both mean zero."""

ScaleRule = Literal["absmax", "e8m0", "e4m3"]
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class FourBitBook:
    """A 4-bit code book, its values by code and in order, and how blocks are scaled.

    Attributes:
        values: value of each code, as a share of the block's scale.
        ordered: codes that are made, in ascending order of value, each value once; the zero among them is ``zero_code``.
        bound: the largest error, as a share of the block's absmax as stored.
        scale: which values the stored absmax may have, see :mod:`q_core.ops.quantize`.
        blocksizes: elements a block.
    """

    values: tuple[float, ...]
    ordered: tuple[int, ...]
    bound: float
    scale: ScaleRule = "absmax"
    blocksizes: tuple[int, ...] = BLOCKSIZES

    @property
    def zero_code(self) -> int:
        return self.values.index(0.0)


_E2M1_ORDERED = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)

FOUR_BIT_BOOKS: dict[str, FourBitBook] = {
    "nf4": FourBitBook(values=NF4, ordered=tuple(range(16)), bound=0.15191),
    "fp4": FourBitBook(values=FP4, ordered=(11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3), bound=1 / 6),
    "int4": FourBitBook(values=INT4, ordered=tuple(range(1, 16)), bound=1 / 14),
    "mxfp4": FourBitBook(values=E2M1, ordered=_E2M1_ORDERED, bound=1 / 6, scale="e8m0", blocksizes=(32,)),
    "nvfp4": FourBitBook(values=E2M1, ordered=_E2M1_ORDERED, bound=1 / 6, scale="e4m3", blocksizes=(16,)),
}
assert tuple(FOUR_BIT_BOOKS) == get_args(FourBitType)

DYNAMIC_SIGNED_BOUND = 0.00704
DYNAMIC_UNSIGNED_BOUND = 0.00352
INT8_BOUND = 1 / 254


def _float32(x: float) -> float:
    """Rounded to float32."""
    rounded: float = struct.unpack("f", struct.pack("f", x))[0]
    return rounded


def _dynamic_values(*, signed: bool) -> tuple[float, ...]:
    """The dynamic 8-bit map (arXiv 2110.02861): 256 float32 values, ascending, finest near zero.

    In each decade 0.1…1 is divided evenly, and the means of neighbouring bounds are taken. Written in Python, with the roundings by which
    the checkpoints that exist were made: a library's ``linspace`` may round otherwise on another machine.
    """
    values = [0.0, 1.0]
    start = _float32(0.1)
    for exponent in range(7):
        intervals = 2**exponent if signed else 2 ** (exponent + 1)
        step = _float32(_float32(1 - start) / intervals)
        # From both ends to the middle; product and sum are rounded once.
        bounds = [
            _float32(start + step * i) if i < (intervals + 1) // 2 else _float32(1 - step * (intervals - i))
            for i in range(intervals + 1)
        ]
        scale = _float32(10.0 ** (exponent - 6))
        means = [_float32(_float32(_float32(a + b) / 2) * scale) for a, b in itertools.pairwise(bounds)]
        values += means
        if signed:
            values += [-x for x in means]
    return tuple(sorted(values))


DYNAMIC_SIGNED = _dynamic_values(signed=True)
"""Code book of values of both signs, such as first moments: 256 values in -0.993…1, zero at index 127."""

DYNAMIC_UNSIGNED = _dynamic_values(signed=False)
"""Code book of values that are never negative, such as second moments: 256 values in 0…1."""


@functools.lru_cache(maxsize=64)
def _book_tensor(quant_type: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(FOUR_BIT_BOOKS[quant_type].values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=64)
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED, dtype=torch.float32, device=device)


def _traced() -> bool:
    """Whether tensors are made for a graph now: a cache doesn't belong into it, a constant does; and no fake tensor into a cache."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


def book_tensor(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit type by code, float32 on a device; shared, not to be written to."""
    if _traced():
        return torch.tensor(FOUR_BIT_BOOKS[quant_type].values, dtype=torch.float32, device=device)
    return _book_tensor(quant_type, device)


def _constant_map(signed: bool, device: torch.device) -> Tensor:
    return _dynamic_map(signed, device)


# What torch.compiler.assume_constant_result does, without importing the compiler.
_constant_map._dynamo_marked_constant = True  # type: ignore[attr-defined]


def dynamic_map(*, signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The dynamic 8-bit map as float32 [256] on a device; shared, not to be written to."""
    device = torch.device(device)
    # The flag, because torch 2.11's compiler takes is_exporting() for true.
    if torch.compiler.is_dynamo_compiling() and not torch.compiler._is_exporting_flag:
        # Tracing 256 numbers takes it seconds a layer. Of a constant's clone it knows the shape.
        return _constant_map(signed, device).clone()
    if _traced():
        return torch.tensor(DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED, dtype=torch.float32, device=device)
    return _dynamic_map(signed, device)
