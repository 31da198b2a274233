"""What the readers of integer weights have in common: one description of a weight, and the format that it is held in.

========================================  =====================================================  =================================
a weight of                               is held as                                             and decodes to
========================================  =====================================================  =================================
4 bits, no zero points, in groups         ``FourBit("int4")``, 4.25 bits a weight at 128         within 2^-22 of each value
4 bits otherwise                          ``AffineGroups``, 4.19 bits at 128                     the exact value in float32 (1)
8 bits, no zero points, a scale a row     ``Int8Rows``                                           within 2^-22 of each value
8 bits otherwise                          ``AffineGroups``                                       the exact value in float32 (1)
========================================  =====================================================  =================================

(1) With float32 scales to its rounding. What a weight's dtype can't hold is rounded to it once, after that.

The first and the third are the formats that backends multiply with directly; rounding a value 2^-22 away may give another bfloat16 where it
lay in the middle of two. Groups are of whole multiples of 32 columns: of any other size, a weight has to be requantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.formats.four_bit import FourBit
from q_core.formats.grouped_int import AffineGroups, pack_codes
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_nn.readers.checks import refuse

_BLOCKSIZES = FOUR_BIT_BOOKS["int4"].blocksizes


@dataclass(frozen=True, slots=True, eq=False)
class GroupedWeight:
    """A weight [N, K] that decodes as ``scale * (code - zero)``, with a scale and a zero point a row and group of columns.

    Attributes:
        name: of the weight, for messages.
        bits: of a code.
        codes: uint8 [N, K].
        scale: float32, bfloat16 or float16 [N, groups].
        zero: uint8 [N, groups]; ``None`` for the middle of the codes everywhere.
        group_of: integers [K], the group of each column; ``None`` if groups are columns side by side.
    """

    name: str
    bits: Literal[4, 8]
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group_of: Tensor | None = None

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def quantized(self, dtype: torch.dtype | None = None, requantize: WeightFormat | None = None) -> QuantizedTensor:
        """The weight in a format of ours.

        Args:
            dtype: that it decodes to; by default the scales'.
            requantize: decode to float32 and quantize to this format instead: the error of that comes on top.

        Raises:
            ValueError: scales aren't finite, or groups aren't of one size, or of one that formats don't have; the message names the weight.
        """
        dtype = dtype or self.scale.dtype
        if count := int((~torch.isfinite(self.scale)).sum()):
            refuse(self.name, f"has {count} scales that are NaN or infinite", "finite ones")
        order = self._order()
        codes = self.codes if order is None else self.codes[:, order]
        zero = None if self.zero is None or bool((self.zero == self._middle).all()) else self.zero
        if requantize is not None:
            return with_dtype(QuantizedTensor.quantize(self._decode(codes, order), requantize), dtype)
        if zero is None and order is None and (simple := self._simple(dtype)) is not None:
            return simple
        try:
            format = AffineGroups(self.bits, self.group_size, order is not None, self.scale.dtype, zero is not None)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; such a weight can be read with requantize=") from error
        components = {**pack_codes(codes, self.bits), "scale": self.scale.contiguous()}
        if zero is not None:
            components["zero"] = zero.contiguous()
        if order is not None:
            components["order"] = order.to(torch.int32)
        return QuantizedTensor.from_components(components, format, shape=self.codes.shape, dtype=dtype)

    def _simple(self, dtype: torch.dtype) -> QuantizedTensor | None:
        """In a format that backends multiply with directly, if one has it."""
        shape = self.codes.shape
        if self.bits == 8:
            if self.scale.shape[1] != 1:
                return None
            rows = {"codes": (self.codes ^ 128).view(torch.int8), "absmax": 127 * self.scale.float().flatten()}
            return QuantizedTensor.from_components(rows, Int8Rows(), shape=shape, dtype=dtype)
        # The largest power of two in the group size is what blocks may have; a group of several repeats its scale.
        blocksize = min(self.group_size & -self.group_size, _BLOCKSIZES[-1])
        if blocksize not in _BLOCKSIZES:
            return None
        absmax = (7 * self.scale.float()).repeat_interleave(self.group_size // blocksize, dim=1).flatten()
        packed = pack_codes(self.codes, 4)["codes"].flatten()
        return QuantizedTensor.from_components(
            {"packed": packed, "absmax": absmax}, FourBit("int4", blocksize), shape=shape, dtype=dtype
        )

    def _order(self) -> Tensor | None:
        """The columns sorted by their groups; ``None`` if they are."""
        if self.group_of is None:
            return None
        groups, group_of = self.scale.shape[1], self.group_of.long()
        if bool(((group_of < 0) | (group_of >= groups)).any()):
            refuse(self.name, f"has columns in the groups {int(group_of.min())} to {int(group_of.max())}", f"0 to {groups - 1}")
        sizes = torch.bincount(group_of, minlength=groups)
        if bool((sizes != self.group_size).any()):
            refuse(self.name, f"has groups of {int(sizes.min())} to {int(sizes.max())} columns", f"of {self.group_size} each")
        order = torch.argsort(group_of, stable=True)
        return None if bool((order[1:] > order[:-1]).all()) else order

    def _decode(self, codes: Tensor, order: Tensor | None) -> Tensor:
        """The weight in float32; its codes are in order."""
        zero = self._middle if self.zero is None else self.zero.float().unsqueeze(-1)
        dense: Tensor = ((codes.float().unflatten(1, (-1, self.group_size)) - zero) * self.scale.float().unsqueeze(-1)).flatten(1)
        return dense if order is None else dense[:, torch.argsort(order)]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes of int32 words [R, C] along their second axis, lowest bits first: uint8 [R, C * 32 / bits]."""
    octets = words.contiguous().view(torch.uint8)  # torch runs on little-endian machines
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def with_dtype(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same components, decoding to another dtype."""
    return QuantizedTensor.from_components(weight.components, weight.format, shape=weight.shape, dtype=dtype)
