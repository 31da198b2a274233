"""How the scales of 4-bit blocks are held: in float32, double-quantized, or in the byte that their type is made for.

Ops take scales as float32 "absmax" (:mod:`q_core.ops.quantize`). Each class here says which component tensors hold them and decodes those
to exactly the absmax that the codes were made with; double quantization alone rounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from q_core import ops
from q_core.formats.codebooks import ScaleRule, dynamic_map

_MANTISSA_HALF = 1 << 22
_E4M3_CODES = 127
"""Codes 0…126 are 0…448 in order; 127 is NaN, and with the sign bit they are negative."""


class BlockScales(ABC):
    """Component tensors that stand for one float32 scale a block. Subclasses are frozen dataclasses."""

    __slots__ = ()

    names: ClassVar[tuple[str, ...]]
    """Names of the components. The first is ``absmax``, with an element a block."""

    codes: ClassVar[int | None] = None
    """How many of the byte's values mean a scale, the lowest ones, where the type says so; ``None`` for all, or for float32."""

    @abstractmethod
    def encode(self, absmax: Tensor, dense: Tensor) -> dict[str, Tensor]:
        """Hold the scales [blocks] of a dense tensor's blocks, as an op gave them."""

    @abstractmethod
    def empty(self, blocks: int, device: torch.device | str) -> dict[str, Tensor]:
        """Uninitialized components."""

    @abstractmethod
    def decode(self, components: Mapping[str, Tensor], blocks: Tensor | None = None) -> Tensor:
        """The float32 absmax of all blocks [blocks], or of those at the indices ``blocks``, in their shape."""


@dataclass(frozen=True, slots=True)
class Float32Scales(BlockScales):
    """The absmax itself, 4 bytes a block."""

    names = ("absmax",)

    def encode(self, absmax: Tensor, dense: Tensor) -> dict[str, Tensor]:
        return {"absmax": absmax}

    def empty(self, blocks: int, device: torch.device | str) -> dict[str, Tensor]:
        return {"absmax": torch.empty(blocks, dtype=torch.float32, device=device)}

    def decode(self, components: Mapping[str, Tensor], blocks: Tensor | None = None) -> Tensor:
        return _at(components["absmax"], blocks)


@dataclass(frozen=True, slots=True)
class NestedScales(BlockScales):
    """Double quantization (QLoRA, arXiv 2305.14314): 8-bit codes of the absmax less its mean, in blocks with a float32 scale each.

    Attributes:
        blocksize: scales a second-level scale.
    """

    blocksize: int
    names = ("absmax", "nested_absmax", "nested_offset")

    def encode(self, absmax: Tensor, dense: Tensor) -> dict[str, Tensor]:
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        codes, nested_absmax = ops.quantize_blockwise(absmax - offset, blocksize=self.blocksize)
        return {"absmax": codes, "nested_absmax": nested_absmax, "nested_offset": offset}

    def empty(self, blocks: int, device: torch.device | str) -> dict[str, Tensor]:
        return {
            "absmax": torch.empty(blocks, dtype=torch.uint8, device=device),
            "nested_absmax": torch.empty(-(-blocks // self.blocksize), dtype=torch.float32, device=device),
            "nested_offset": torch.empty((), dtype=torch.float32, device=device),
        }

    def decode(self, components: Mapping[str, Tensor], blocks: Tensor | None = None) -> Tensor:
        codes, nested_absmax = components["absmax"], components["nested_absmax"]
        book = dynamic_map(signed=True, device=codes.device)
        if blocks is None:
            centered = ops.dequantize_blockwise(codes, nested_absmax, book, blocksize=self.blocksize)
        else:
            centered = _at(book, _at(codes, blocks).int()) * _at(nested_absmax, blocks // self.blocksize)
        return centered + components["nested_offset"]


@dataclass(frozen=True, slots=True)
class E8M0Scales(BlockScales):
    """OCP's E8M0, a byte a block: code ``e + 127`` for an absmax of ``6 * 2^e``. A block of zeros, whose scale is any, has code 0."""

    names = ("absmax",)
    codes = 253

    def encode(self, absmax: Tensor, dense: Tensor) -> dict[str, Tensor]:
        # 6 * 2^e is 1.5 * 2^(e + 2), whose exponent float32 holds as e + 129.
        return {"absmax": ((absmax.view(torch.int32) >> 23) - 2).clamp_min(0).to(torch.uint8)}

    def empty(self, blocks: int, device: torch.device | str) -> dict[str, Tensor]:
        return {"absmax": torch.empty(blocks, dtype=torch.uint8, device=device)}

    def decode(self, components: Mapping[str, Tensor], blocks: Tensor | None = None) -> Tensor:
        # Codes that mean no scale become an exponent of 255, and so NaN.
        exponent = (_at(components["absmax"], blocks).int() + 2).clamp_max(255)
        return ((exponent << 23) | _MANTISSA_HALF).view(torch.float32)


@dataclass(frozen=True, slots=True)
class E4M3Scales(BlockScales):
    """A byte in E4M3 a block and one float32 for the whole tensor: an absmax of ``6 * (tensor_scale * value)``."""

    names = ("absmax", "tensor_scale")
    codes = _E4M3_CODES

    def encode(self, absmax: Tensor, dense: Tensor) -> dict[str, Tensor]:
        tensor_scale = _largest(dense) / torch.full((), 2688.0, device=dense.device)
        scales = _absmax(torch.arange(_E4M3_CODES, dtype=torch.uint8, device=dense.device), tensor_scale)
        # Neighbours are 6 % apart where they aren't equal; NaN and infinity come behind all, at the code that is NaN.
        codes = torch.searchsorted(scales * (1 + 1e-6), absmax)
        return {"absmax": codes.to(torch.uint8), "tensor_scale": tensor_scale}

    def empty(self, blocks: int, device: torch.device | str) -> dict[str, Tensor]:
        return {
            "absmax": torch.empty(blocks, dtype=torch.uint8, device=device),
            "tensor_scale": torch.empty((), dtype=torch.float32, device=device),
        }

    def decode(self, components: Mapping[str, Tensor], blocks: Tensor | None = None) -> Tensor:
        return _absmax(_at(components["absmax"], blocks), components["tensor_scale"])


FLOAT32 = Float32Scales()
BY_RULE: dict[ScaleRule, BlockScales] = {"absmax": FLOAT32, "e8m0": E8M0Scales(), "e4m3": E4M3Scales()}
"""How the scales that a type makes are held, unless it is asked otherwise."""


def _at(values: Tensor, indices: Tensor | None) -> Tensor:
    # Not values[indices], for which -1 is the last.
    return values if indices is None else values.index_select(0, indices.reshape(-1)).view(indices.shape)


def _absmax(codes: Tensor, tensor_scale: Tensor) -> Tensor:
    """In the order in which the ops' rule multiplies, so that every bit is the same."""
    return 6 * (tensor_scale * codes.view(torch.float8_e4m3fn).float())


def _largest(dense: Tensor) -> Tensor:
    if not dense.numel():
        return torch.zeros((), device=dense.device)
    lowest, highest = torch.aminmax(dense)
    return torch.maximum(-lowest, highest).float()
