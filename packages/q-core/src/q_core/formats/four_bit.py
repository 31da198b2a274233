"""4-bit block formats, optionally with double-quantized scales (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from q_core import ops
from q_core.formats.codebooks import BLOCKSIZES, FOUR_BIT_BOOKS, FourBitType, dynamic_map
from q_core.formats.weight_format import Components, WeightFormat

NESTED_BLOCKSIZE = 256
"""Scales a block of double quantization, in every checkpoint in the field."""


@dataclass(frozen=True, slots=True)
class FourBit(WeightFormat):
    """Two codes a byte, a float32 scale a block of the flat tensor; with double quantization the scales are 8-bit codes themselves.

    The components are ``packed`` uint8 [ceil(numel / 2)] and ``absmax`` float32 [blocks], or with double quantization ``absmax`` uint8
    [blocks], ``nested_absmax`` float32 [ceil(blocks / nested_blocksize)] and ``nested_offset`` float32 []. A weight takes 4.5 bits an
    element at blocksize 64, and 4.127 with double quantization.

    Attributes:
        quant_type: a 4-bit type of :func:`q_core.ops.quantize_4bit`.
        blocksize: elements a scale, as the type has it.
        nested_blocksize: scales a second-level scale if the scales are quantized too, else ``None``; a power of two in 32…4096.
    """

    quant_type: FourBitType = "nf4"
    blocksize: int = 64
    nested_blocksize: int | None = None

    def __post_init__(self) -> None:
        if self.quant_type not in FOUR_BIT_BOOKS:
            raise ValueError(f"FourBit: quant_type is {self.quant_type!r}, expected one of {tuple(FOUR_BIT_BOOKS)}")
        blocksizes = FOUR_BIT_BOOKS[self.quant_type].blocksizes
        if self.blocksize not in blocksizes:
            raise ValueError(f"FourBit: blocksize is {self.blocksize!r}, expected one of {blocksizes} for {self.quant_type!r}")
        if self.nested_blocksize is not None and self.nested_blocksize not in BLOCKSIZES:
            raise ValueError(f"FourBit: nested_blocksize is {self.nested_blocksize!r}, expected None or one of {BLOCKSIZES}")

    @property
    def component_names(self) -> tuple[str, ...]:
        if self.nested_blocksize is None:
            return ("packed", "absmax")
        return ("packed", "absmax", "nested_absmax", "nested_offset")

    @property
    def derives(self) -> bool:
        return self.nested_blocksize is not None

    @property
    def resolved_format(self) -> FourBit:
        return replace(self, nested_blocksize=None)

    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        packed, absmax = ops.quantize_4bit(dense, blocksize=self.blocksize, quant_type=self.quant_type)
        if self.nested_blocksize is None:
            return {"packed": packed, "absmax": absmax}
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        codes, nested_absmax = ops.quantize_blockwise(absmax - offset, blocksize=self.nested_blocksize)
        return {"packed": packed, "absmax": codes, "nested_absmax": nested_absmax, "nested_offset": offset}

    def empty(self, shape: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        numel = math.prod(shape)
        blocks = -(-numel // self.blocksize)
        packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=device)
        if self.nested_blocksize is None:
            return {"packed": packed, "absmax": torch.empty(blocks, dtype=torch.float32, device=device)}
        return {
            "packed": packed,
            "absmax": torch.empty(blocks, dtype=torch.uint8, device=device),
            "nested_absmax": torch.empty(-(-blocks // self.nested_blocksize), dtype=torch.float32, device=device),
            "nested_offset": torch.empty((), dtype=torch.float32, device=device),
        }

    def resolve(self, components: Components) -> Components:
        if self.nested_blocksize is None:
            return components
        codes = components["absmax"]
        centered = ops.dequantize_blockwise(
            codes, components["nested_absmax"], dynamic_map(signed=True, device=codes.device), blocksize=self.nested_blocksize
        )
        return {"packed": components["packed"], "absmax": centered + components["nested_offset"]}

    def dequantize(self, resolved: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return ops.dequantize_4bit(
            resolved["packed"],
            resolved["absmax"],
            shape=shape,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=dtype,
        )

    def linear(self, x_TK: Tensor, resolved: Components, shape: Sequence[int], bias: Tensor | None, layout: str) -> Tensor:
        return ops.gemm_4bit(
            x_TK,
            resolved["packed"],
            resolved["absmax"],
            shape=shape,
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            bias=bias,
            layout=layout,
        )

    def embedding(self, ids: Tensor, resolved: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        V, K = shape
        if K % self.blocksize:  # rows share blocks, so they can't be gathered before they are decoded
            return torch.nn.functional.embedding(ids, self.dequantize(resolved, shape, dtype))
        return self.dequantize(
            {
                "packed": resolved["packed"].view(V, K // 2)[ids].reshape(-1),
                "absmax": resolved["absmax"].view(V, K // self.blocksize)[ids].reshape(-1),
            },
            (*ids.shape, K),
            dtype,
        )

    @property
    def prepack_arguments(self) -> Mapping[str, Any]:
        return {"format": self.quant_type, "blocksize": self.blocksize}

    def check_cut(self, shape: Sequence[int], row: int) -> None:
        if row != shape[0] and row * math.prod(shape[1:]) % self.blocksize:
            raise ValueError(
                f"a weight {list(shape)} in blocks of {self.blocksize} can't be cut before row {row}, which is inside a block; "
                "cut at whole blocks (fully_shard: or give the parameter to ignored_params), or call .dequantize() first"
            )

    def rows(self, resolved: Components, shape: Sequence[int], start: int, stop: int) -> tuple[FourBit, dict[str, Tensor]]:
        self.check_cut(shape, start)
        self.check_cut(shape, stop)
        row = math.prod(shape[1:])
        first, last = start * row, stop * row
        return self.resolved_format, {
            "packed": resolved["packed"][-(-first // 2) : -(-last // 2)],
            "absmax": resolved["absmax"][-(-first // self.blocksize) : -(-last // self.blocksize)],
        }
