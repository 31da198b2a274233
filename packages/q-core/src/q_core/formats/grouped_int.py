"""Integers with a scale and a zero point a group of columns: what GPTQ, AWQ, compressed-tensors and GGUF hold.

A row of the weight is divided into groups of ``group_size`` columns, and decodes as ``scale * (code - zero)`` with unsigned codes of 4 or
8 bits. Two ways to hold the scales are in the field: :class:`AffineGroups` has one of each a group, and :class:`SuperGroups`, GGUF's
Q4_K, divides both once more.

In float32 the decoding is exact wherever scales are float16 or bfloat16: an integer of at most 9 bits times one of at most 11. So these
formats hold other programs' weights without a second rounding, which block formats with a code book can't do.

The product is one with "int4" blocks, whose codes stand for ``code - 8``, and a dense one that is ``group_size`` times smaller for what is
left: ``x · scale * (code - zero) = x · scale * (code - 8) + sum(x of the group) * scale * (8 - zero)``. An 8-bit code is two of 4 bits.
Both are computed in float32, because their sum may be much smaller than they are, and rounded once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core import ops
from q_core.backend import NoBackendError
from q_core.formats.codebooks import BLOCKSIZES
from q_core.formats.weight_format import WEIGHT_DTYPES, Components, WeightFormat
from q_core.layouts import CANONICAL
from q_core.specs.check import short

_MIN_GROUP = BLOCKSIZES[0]
_LARGEST_SCALE = 63
"""Of what SuperGroups holds in 6 bits."""
_INT4_ZERO = 8
"""What the codes of the op's "int4" stand for is the code less this, in sevenths."""


@dataclass(frozen=True, slots=True)
class GroupedInt(WeightFormat):
    """What both ways to hold the scales share. Components are rows of the weight along their first axis, but ``order``.

    Attributes:
        bits: of a code. ``codes`` uint8 [N, K / 2] holds two of 4 bits a byte, the first in the high nibble; of 8 bits it holds the high
            halves, and ``low_codes`` the low ones.
        group_size: columns a scale, a multiple of 32 that divides K.
        ordered: whether ``order`` int32 [K] is there: column j of the codes is column ``order[j]`` of the weight (GPTQ's "desc_act").
    """

    bits: Literal[4, 8] = 4
    group_size: int = 128
    ordered: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.bits not in (4, 8):
            raise ValueError(f"{name}: bits is {self.bits!r}, expected 4 or 8")
        if type(self.group_size) is not int or self.group_size <= 0 or self.group_size % _MIN_GROUP:
            raise ValueError(f"{name}: group_size is {self.group_size!r}, expected a multiple of {_MIN_GROUP}")

    @property
    @abstractmethod
    def scale_names(self) -> tuple[str, ...]:
        """Names of the components that the scales are held in."""

    @abstractmethod
    def empty_scales(self, N: int, K: int, device: torch.device | str) -> dict[str, Tensor]:
        """Those components, uninitialized."""

    @abstractmethod
    def scale_and_offset(self, components: Components) -> tuple[Tensor, Tensor | None]:
        """A group decodes as ``scale * code + offset``: both float32 [N, K / group_size]; no offset stands for the middle of the codes."""

    @abstractmethod
    def decode(self, codes: Tensor, components: Components) -> Tensor:
        """What codes stand for: both float32 [N, K / group_size, group_size], rounded once."""

    # --- components -------------------------------------------------------------------------------------------------

    @property
    def component_names(self) -> tuple[str, ...]:
        low = ("low_codes",) if self.bits == 8 else ()
        return ("codes", *low, *self.scale_names, *(("order",) if self.ordered else ()))

    def empty(self, shape: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        if len(shape) != 2 or shape[1] % self.group_size:
            raise ValueError(f"{self}: the weight has shape {list(shape)}, expected [N, K] with K a multiple of {self.group_size}")
        N, K = shape
        components = {"codes": torch.empty(N, K // 2, dtype=torch.uint8, device=device)}
        if self.bits == 8:
            components["low_codes"] = torch.empty(N, K // 2, dtype=torch.uint8, device=device)
        components.update(self.empty_scales(N, K, device))
        if self.ordered:
            components["order"] = torch.empty(K, dtype=torch.int32, device=device)
        return components

    # --- what the ops make of them ----------------------------------------------------------------------------------

    def dequantize(self, resolved: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes = _unpack(resolved["codes"])
        if self.bits == 8:
            codes = codes * 16 + _unpack(resolved["low_codes"])
        dense = self.decode(codes.float().unflatten(-1, (-1, self.group_size)), resolved).flatten(-2).to(dtype)
        if self.ordered:
            dense = dense[:, torch.argsort(resolved["order"])]
        return dense.reshape(tuple(shape))

    def linear(self, x_TK: Tensor, resolved: Components, shape: Sequence[int], bias: Tensor | None, layout: str) -> Tensor:
        kind = x_TK.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.linear(x_TK.to(torch.get_autocast_dtype(kind)), resolved, shape, bias, layout)
        if layout != CANONICAL:
            self._refuse_layout(layout)
        x = x_TK.float()
        if self.ordered:
            x = x.index_select(-1, resolved["order"])
        scale, offset = self.scale_and_offset(resolved)
        if self.bits == 4:
            y = self._times_int4(x, resolved["codes"], scale, shape)
            rest = None if offset is None else offset + _INT4_ZERO * scale
        else:
            y = self._times_int4(x, resolved["codes"], 16 * scale, shape) + self._times_int4(x, resolved["low_codes"], scale, shape)
            rest = _INT4_ZERO * scale if offset is None else offset + (17 * _INT4_ZERO) * scale
        if rest is not None:
            y = y + F.linear(x.unflatten(-1, (-1, self.group_size)).sum(-1), rest)
        if bias is not None:
            y = y + bias
        return y.to(x_TK.dtype)

    def _times_int4(self, x_TK: Tensor, codes: Tensor, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """The product with ``scale * (codes - 8)``."""
        # The largest power of two in the group size is what blocks of the op may have; a group of several repeats its scale.
        blocksize = min(self.group_size & -self.group_size, BLOCKSIZES[-1])
        absmax = (7 * scale).repeat_interleave(self.group_size // blocksize, dim=1)
        return ops.gemm_4bit(x_TK, codes, absmax.reshape(-1), shape=shape, blocksize=blocksize, quant_type="int4")

    def embedding(self, ids: Tensor, components: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        rows = ids.reshape(-1)  # index_select refuses what is no row; an index in brackets takes -1 for the last
        gathered = {name: part if name == "order" else part.index_select(0, rows) for name, part in components.items()}
        return self.dequantize(gathered, (*ids.shape, shape[1]), dtype)

    # --- rows and layouts -------------------------------------------------------------------------------------------

    def check_cut(self, shape: Sequence[int], row: int) -> None:
        if len(shape) != 2:
            raise ValueError(f"a weight in groups seen as {list(shape)} has no rows to cut, expected two axes [N, K]")
        if self.ordered and row not in (0, shape[0]):
            raise ValueError(
                f"a weight {list(shape)} with an order of its columns can't be cut before row {row}, as its parts would share the order; "
                "leave it whole (fully_shard: give the parameter to ignored_params), or call .dequantize() first"
            )

    def rows(self, resolved: Components, shape: Sequence[int], start: int, stop: int) -> tuple[GroupedInt, dict[str, Tensor]]:
        self.check_cut(shape, start)
        self.check_cut(shape, stop)
        return self, {name: part if name == "order" else part[start:stop] for name, part in resolved.items()}

    @property
    def prepack_arguments(self) -> Mapping[str, Any]:
        self._refuse_layout("a private one")

    def prepack(self, resolved: Components, shape: Sequence[int], layout: str) -> Components:
        self._refuse_layout(layout)

    def _refuse_layout(self, layout: str) -> NoReturn:
        raise NoBackendError(
            f"prepack: nobody makes the layout {layout!r} of {self}; the surface has no such weights in private layouts"
        )


@dataclass(frozen=True, slots=True)
class AffineGroups(GroupedInt):
    """A scale a group, and a zero point: ``scale`` float [N, K / group_size] and ``zero`` uint8 of the same shape.

    At group size 128 a 4-bit weight takes 4.19 bits, without zero points 4.125.

    Attributes:
        scale_dtype: that scales are held in: float32, bfloat16 or float16.
        zeros: whether there are zero points; without them it is the middle of the codes, 8 or 128.
    """

    scale_dtype: torch.dtype = torch.float16
    zeros: bool = True

    def __post_init__(self) -> None:
        GroupedInt.__post_init__(self)
        if self.scale_dtype not in WEIGHT_DTYPES:
            raise ValueError(f"AffineGroups: scale_dtype is {self.scale_dtype}, expected one of {tuple(map(short, WEIGHT_DTYPES))}")

    @property
    def scale_names(self) -> tuple[str, ...]:
        return ("scale", "zero") if self.zeros else ("scale",)

    def empty_scales(self, N: int, K: int, device: torch.device | str) -> dict[str, Tensor]:
        groups = K // self.group_size
        scales = {"scale": torch.empty(N, groups, dtype=self.scale_dtype, device=device)}
        if self.zeros:
            scales["zero"] = torch.empty(N, groups, dtype=torch.uint8, device=device)
        return scales

    def scale_and_offset(self, components: Components) -> tuple[Tensor, Tensor | None]:
        scale = components["scale"].float()
        return scale, -scale * components["zero"] if self.zeros else None

    def decode(self, codes: Tensor, components: Components) -> Tensor:
        zero = components["zero"].float().unsqueeze(-1) if self.zeros else 2 ** (self.bits - 1)
        return (codes - zero) * components["scale"].float().unsqueeze(-1)

    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        """Round to the nearest of the group's range, in which zero always is; columns are never reordered."""
        components = self.empty(dense.shape, dense.device)
        top, middle = 2**self.bits - 1, 2 ** (self.bits - 1)
        groups = dense.float().unflatten(1, (-1, self.group_size))
        if self.zeros:
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scale = self._representable((high - low) / top)
            zero = (-low / scale).round().clamp(0, top)
            components["zero"] = zero.to(torch.uint8)
        else:
            scale = self._representable(groups.abs().amax(-1) / (middle - 1))
            zero = torch.full_like(scale, middle)
        codes = ((groups / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top).flatten(1).to(torch.uint8)
        components["scale"] = scale.to(self.scale_dtype)
        components.update(pack_codes(codes, self.bits))
        if self.ordered:
            components["order"] = torch.arange(dense.shape[1], dtype=torch.int32, device=dense.device)
        return components

    def _representable(self, scale: Tensor) -> Tensor:
        """The scales as they will be held; 1 for a group of zeros."""
        info = torch.finfo(self.scale_dtype)
        return scale.clamp(info.tiny, info.max).to(self.scale_dtype).float().where(scale > 0, 1.0)


@dataclass(frozen=True, slots=True)
class SuperGroups(GroupedInt):
    """GGUF's Q4_K: a scale and an offset a group, of 6 bits each, and a float16 of each a super-block of ``per_block`` groups.

    A group decodes as ``super_scale * scale * code - super_min * min``. Components are ``scale`` and ``min``, uint8 [N, K / group_size],
    ``super_scale`` and ``super_min``, float16 [N, K / (group_size * per_block)]. With 8 groups of 32 a weight takes 4.625 bits.

    Attributes:
        per_block: groups a super-block.
    """

    group_size: int = 32
    per_block: int = 8

    def __post_init__(self) -> None:
        GroupedInt.__post_init__(self)
        if self.bits != 4:
            raise ValueError(
                f"SuperGroups: bits is {self.bits}, expected 4; 6-bit scales times 8-bit codes aren't exact in float32"
            )
        if type(self.per_block) is not int or self.per_block <= 0:
            raise ValueError(f"SuperGroups: per_block is {self.per_block!r}, expected groups a super-block")

    @property
    def scale_names(self) -> tuple[str, ...]:
        return ("scale", "min", "super_scale", "super_min")

    def empty_scales(self, N: int, K: int, device: torch.device | str) -> dict[str, Tensor]:
        groups, blocks = K // self.group_size, K // (self.group_size * self.per_block)
        if blocks * self.per_block != groups:
            raise ValueError(f"{self}: K is {K}, expected a multiple of {self.group_size * self.per_block}")
        return {
            "scale": torch.empty(N, groups, dtype=torch.uint8, device=device),
            "min": torch.empty(N, groups, dtype=torch.uint8, device=device),
            "super_scale": torch.empty(N, blocks, dtype=torch.float16, device=device),
            "super_min": torch.empty(N, blocks, dtype=torch.float16, device=device),
        }

    def scale_and_offset(self, components: Components) -> tuple[Tensor, Tensor | None]:
        super_scale, super_min = (
            components[name].float().repeat_interleave(self.per_block, dim=1) for name in ("super_scale", "super_min")
        )
        return super_scale * components["scale"], -super_min * components["min"]

    def decode(self, codes: Tensor, components: Components) -> Tensor:
        scale, offset = self.scale_and_offset(components)
        assert offset is not None
        return codes * scale.unsqueeze(-1) + offset.unsqueeze(-1)

    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        """Round to the nearest of each group's range, of which the ends are rounded first; columns are never reordered."""
        components = self.empty(dense.shape, dense.device)
        groups = dense.float().unflatten(1, (-1, self.group_size))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        components["scale"], components["super_scale"] = self._in_blocks((high - low) / 15)
        components["min"], components["super_min"] = self._in_blocks(-low)
        scale, offset = self.scale_and_offset(components)
        assert offset is not None
        codes = (groups - offset.unsqueeze(-1)) / scale.where(scale > 0, 1.0).unsqueeze(-1)
        components.update(pack_codes(codes.round().clamp(0, 15).flatten(1).to(torch.uint8), 4))
        if self.ordered:
            components["order"] = torch.arange(dense.shape[1], dtype=torch.int32, device=dense.device)
        return components

    def _in_blocks(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values that aren't negative, in 63rds of the largest of their super-block, and that in float16."""
        blocks = values.unflatten(1, (-1, self.per_block))
        shared = (blocks.amax(-1) / _LARGEST_SCALE).clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
        divisor = shared.float().where(shared > 0, 1.0).unsqueeze(-1)
        return (blocks / divisor).round().clamp(0, _LARGEST_SCALE).flatten(1).to(torch.uint8), shared


def pack_codes(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """The components that hold codes, uint8 [N, K] with K even."""
    if bits == 4:
        return {"codes": _pack(codes)}
    return {"codes": _pack(codes >> 4), "low_codes": _pack(codes & 15)}


def _pack(nibbles: Tensor) -> Tensor:
    return nibbles[:, ::2] << 4 | nibbles[:, 1::2]


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)
