"""4-bit block formats, optionally with double-quantized scales (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from q_core import ops
from q_core.formats.block_scales import BY_RULE, FLOAT32, BlockScales, NestedScales
from q_core.formats.codebooks import BLOCKSIZES, FOUR_BIT_BOOKS, FourBitType, book_tensor
from q_core.formats.weight_format import Components, WeightFormat

NESTED_BLOCKSIZE = 256
"""Scales a block of double quantization, in every checkpoint in the field."""

_DEFAULT_BLOCKSIZE = 64


@dataclass(frozen=True, slots=True)
class FourBit(WeightFormat):
    """Two codes a byte, and a scale a block of the flat tensor.

    The components are ``packed`` uint8 [ceil(numel / 2)] and what holds the scales:

    - "nf4", "fp4" and "int4": ``absmax`` float32 [blocks]; or double-quantized, ``absmax`` uint8 [blocks], ``nested_absmax`` float32
      [ceil(blocks / nested_blocksize)] and ``nested_offset`` float32 []. 4.5 bits an element at blocksize 64, or 4.127.
    - "mxfp4": ``absmax`` uint8 [blocks], in E8M0: 4.25 bits.
    - "nvfp4": ``absmax`` uint8 [blocks], in E4M3, and ``tensor_scale`` float32 []: 4.5 bits.

    Scales in a byte decode to exactly what the codes were made with (:mod:`q_core.ops.quantize`).

    Attributes:
        quant_type: a 4-bit type of :func:`q_core.ops.quantize_4bit`.
        blocksize: elements a scale, as the type has it: 32 for "mxfp4", 16 for "nvfp4".
        nested_blocksize: scales a second-level scale if the scales are quantized too, else ``None``; a power of two in 32…4096. Not for
            "mxfp4" and "nvfp4".
        float32_scales: hold the scales of "mxfp4" and "nvfp4" as ``absmax`` float32 [blocks] too, as shards and prepacked weights do: 5
            and 6 bits.
    """

    quant_type: FourBitType = "nf4"
    blocksize: int = _DEFAULT_BLOCKSIZE
    nested_blocksize: int | None = None
    float32_scales: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in FOUR_BIT_BOOKS:
            raise ValueError(f"FourBit: quant_type is {self.quant_type!r}, expected one of {tuple(FOUR_BIT_BOOKS)}")
        book = FOUR_BIT_BOOKS[self.quant_type]
        if self.blocksize not in book.blocksizes:
            raise ValueError(f"FourBit: blocksize is {self.blocksize!r}, expected one of {book.blocksizes} for {self.quant_type!r}")
        if self.nested_blocksize is not None:
            if self.nested_blocksize not in BLOCKSIZES:
                raise ValueError(f"FourBit: nested_blocksize is {self.nested_blocksize!r}, expected None or one of {BLOCKSIZES}")
            if book.scale != "absmax":
                raise ValueError(
                    f"FourBit: nested_blocksize is {self.nested_blocksize}, expected None for {self.quant_type!r}, "
                    "whose scales are a byte each already; leave double quantization out"
                )
        if not isinstance(self.float32_scales, bool):
            raise TypeError(f"FourBit: float32_scales is {self.float32_scales!r}, expected True or False")
        if self.float32_scales and book.scale == "absmax":
            raise ValueError(f"FourBit: float32_scales is for types with scales in a byte, expected False for {self.quant_type!r}")

    @classmethod
    def of(cls, quant_type: FourBitType, *, blocksize: int | None = None, double_quant: bool | None = None) -> FourBit:
        """The format of a type, as it is most often used.

        Args:
            quant_type: "nf4", "fp4", "int4", "mxfp4" or "nvfp4".
            blocksize: elements a scale; by default 64, or what the type allows.
            double_quant: quantize the scales too; by default where they are float32, which "mxfp4" and "nvfp4" don't have.

        Raises:
            ValueError: the type is unknown, or doesn't have that blocksize or double quantization.
        """
        book = FOUR_BIT_BOOKS.get(quant_type)
        if book is not None:
            if blocksize is None:
                blocksize = _DEFAULT_BLOCKSIZE if _DEFAULT_BLOCKSIZE in book.blocksizes else book.blocksizes[0]
            if double_quant is None:
                double_quant = book.scale == "absmax"
        return cls(quant_type, _DEFAULT_BLOCKSIZE if blocksize is None else blocksize, NESTED_BLOCKSIZE if double_quant else None)

    @property
    def scales(self) -> BlockScales:
        """How the scales are held."""
        if self.nested_blocksize is not None:
            return NestedScales(self.nested_blocksize)
        return FLOAT32 if self.float32_scales else BY_RULE[FOUR_BIT_BOOKS[self.quant_type].scale]

    @property
    def component_names(self) -> tuple[str, ...]:
        return ("packed", *self.scales.names)

    @property
    def derives(self) -> bool:
        return self.nested_blocksize is not None or self.scales is not FLOAT32

    @property
    def resolved_format(self) -> FourBit:
        return replace(self, nested_blocksize=None, float32_scales=FOUR_BIT_BOOKS[self.quant_type].scale != "absmax")

    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        packed, absmax = ops.quantize_4bit(dense, blocksize=self.blocksize, quant_type=self.quant_type)
        return {"packed": packed, **self.scales.encode(absmax, dense)}

    def empty(self, shape: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        numel = math.prod(shape)
        packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=device)
        return {"packed": packed, **self.scales.empty(-(-numel // self.blocksize), device)}

    def resolve(self, components: Components) -> Components:
        if not self.derives:
            return components
        return {"packed": components["packed"], "absmax": self.scales.decode(components)}

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

    def embedding(self, ids: Tensor, components: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        # index_select refuses what is no row; an index in brackets takes -1 for the last.
        V, K = shape
        rows = ids.reshape(-1).long()
        if K == 1:  # half a byte of padding would pass for one row more
            return self.dequantize(self.resolve(components), shape, dtype).index_select(0, rows).view(*ids.shape, 1)
        if K % self.blocksize:
            return self._rows_across_blocks(rows, components, K, dtype).view(*ids.shape, K)
        blocks = K // self.blocksize
        packed = components["packed"].view(V, K // 2).index_select(0, rows)
        absmax = self.scales.decode(components, rows.unsqueeze(1) * blocks + torch.arange(blocks, device=rows.device))
        return self.dequantize({"packed": packed, "absmax": absmax.view(-1)}, (*ids.shape, K), dtype)

    def _rows_across_blocks(self, rows: Tensor, components: Components, K: int, dtype: torch.dtype) -> Tensor:
        """Rows [T] that begin and end anywhere in a block, or in a byte: [T, K]."""
        starts = rows.unsqueeze(1) * K
        bytes_ = (K + 1) // 2  # of a row, wherever it begins
        packed = components["packed"].index_select(0, (starts // 2 + torch.arange(bytes_, device=rows.device)).view(-1))
        codes = torch.stack((packed >> 4, packed & 15), 1).view(-1).int()
        values = book_tensor(self.quant_type, rows.device).index_select(0, codes).view(-1, 2 * bytes_)
        if K % 2:
            values = torch.where(starts % 2 == 0, values[:, :K], values[:, 1:])
        run = math.gcd(K, self.blocksize)  # elements that share a scale for certain
        absmax = self.scales.decode(components, (starts + torch.arange(0, K, run, device=rows.device)) // self.blocksize)
        return (values.view(-1, K // run, run) * absmax.unsqueeze(2)).view(-1, K).to(dtype)

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
