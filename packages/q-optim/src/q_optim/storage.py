"""How states are held: in float32, or as codes of 8 or 4 bits in blocks, each block with its own scale.

A state is named ``state1`` (a first moment, which has both signs), ``state2`` (a second moment, which is never negative) or ``state3``
(another first moment), as in :mod:`q_core.optimizers`. Codes have a scale a block beside them, ``absmax1`` and so on.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from q_core import ops
from q_core.formats.codebooks import DYNAMIC_SIGNED, dynamic_map
from q_optim.segment import Segment, absmax_key

MIN_BLOCKSIZE = 32

FOUR_BIT_SIGNED = (
    -0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0,
    0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0,
)  # fmt: skip
"""First moments in 4 bits: the dynamic map of 8-bit states with as many bits as that leaves."""

FOUR_BIT_ZERO_FREE = tuple((code + 1) / 16 for code in range(16))
"""Second moments in 4 bits: linear and without zero, over whose root an update would explode (arXiv 2309.01507, 4.1)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a state, as it is before the first step: all elements ``fill``."""

    key: str
    dtype: torch.dtype
    shape: torch.Size
    fill: float


def _is_signed(state: str) -> bool:
    return state != "state2"


class Storage(ABC):
    """A way to hold states, of tensors of any shape; ``bits`` an element, and ``blocksize`` elements a scale (0: there are none)."""

    bits: ClassVar[int]

    def __init__(self, blocksize: int = 0) -> None:
        self.blocksize = blocksize

    @abstractmethod
    def parts(self, state: str, shape: torch.Size, initial: float) -> Iterator[Part]:
        """The tensors of a state of a parameter of this shape, all of whose elements are ``initial``, 0 or more."""

    @abstractmethod
    def decode(self, segment: Segment, state: str) -> Tensor:
        """A state in float32, flat."""

    @abstractmethod
    def encode(self, segment: Segment, state: str, value: Tensor, keep: Tensor) -> None:
        """Hold a float32 state, except for elements where ``keep`` is false; those are whole blocks."""

    def _scales(self, state: str, shape: torch.Size, initial: float) -> Part:
        return Part(absmax_key(state), torch.float32, scales_shape(shape, self.blocksize), initial)


class Float32(Storage):
    bits = 32

    def parts(self, state: str, shape: torch.Size, initial: float) -> Iterator[Part]:
        yield Part(state, torch.float32, shape, initial)

    def decode(self, segment: Segment, state: str) -> Tensor:
        return segment.states[state]

    def encode(self, segment: Segment, state: str, value: Tensor, keep: Tensor) -> None:
        held = segment.states[state]
        held.copy_(torch.where(keep, value, held))


class EightBit(Storage):
    bits = 8

    def parts(self, state: str, shape: torch.Size, initial: float) -> Iterator[Part]:
        one, zero = 255, DYNAMIC_SIGNED.index(0.0) if _is_signed(state) else 0
        yield Part(state, torch.uint8, shape, one if initial else zero)
        yield self._scales(state, shape, initial)

    def decode(self, segment: Segment, state: str) -> Tensor:
        codes, absmax = segment.states[state], segment.states[absmax_key(state)]
        return ops.dequantize_blockwise(codes, absmax, self._book(state, codes.device), blocksize=self.blocksize)

    def encode(self, segment: Segment, state: str, value: Tensor, keep: Tensor) -> None:
        codes, absmax = ops.quantize_blockwise(value, self._book(state, value.device), blocksize=self.blocksize)
        _replace(segment, state, codes, absmax, keep, self.blocksize)

    @staticmethod
    def _book(state: str, device: torch.device) -> Tensor:
        return dynamic_map(signed=_is_signed(state), device=device)


class FourBit(Storage):
    """Codes of 4 bits, two a byte, the first in the high half; an odd count ends with a zero (arXiv 2309.01507)."""

    bits = 4

    def parts(self, state: str, shape: torch.Size, initial: float) -> Iterator[Part]:
        code = 15 if initial else (FOUR_BIT_SIGNED.index(0.0) if _is_signed(state) else 0)
        yield Part(state, torch.uint8, packed_shape(shape), code << 4 | code)
        yield self._scales(state, shape, initial)

    def decode(self, segment: Segment, state: str) -> Tensor:
        packed, absmax = segment.states[state], segment.states[absmax_key(state)]
        codes = torch.stack((packed >> 4, packed & 15), -1).view(-1)[: segment.param.numel()]
        return ops.dequantize_blockwise(codes, absmax, self._book(state, codes.device), blocksize=self.blocksize)

    def encode(self, segment: Segment, state: str, value: Tensor, keep: Tensor) -> None:
        codes, absmax = ops.quantize_blockwise(value, self._book(state, value.device), blocksize=self.blocksize)
        if codes.numel() % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        _replace(segment, state, codes[0::2] << 4 | codes[1::2], absmax, keep, self.blocksize)

    @staticmethod
    def _book(state: str, device: torch.device) -> Tensor:
        return _four_bit_book(_is_signed(state), device)


@functools.lru_cache
def _four_bit_book(signed: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(FOUR_BIT_SIGNED if signed else FOUR_BIT_ZERO_FREE, dtype=torch.float32, device=device)


STORAGES: dict[int, type[Storage]] = {storage.bits: storage for storage in (Float32, EightBit, FourBit)}
DEFAULT_BLOCKSIZES = {32: 0, 8: 256, 4: 128}


@functools.lru_cache
def storage_of(bits: int, blocksize: int) -> Storage:
    """The storage of these settings; the same one each time."""
    return STORAGES[bits](blocksize)


def scales_shape(shape: torch.Size, blocksize: int) -> torch.Size:
    """One scale a block: [rows, blocks a row] where blocks end with rows, so that rows can be shared out; else [blocks]."""
    row = _row_size(shape)
    if row and row % blocksize == 0:
        return torch.Size((shape[0], row // blocksize))
    return torch.Size((-(-shape.numel() // blocksize),))


def packed_shape(shape: torch.Size) -> torch.Size:
    """Two elements a byte: [rows, bytes a row] where bytes end with rows, else [bytes]."""
    row = _row_size(shape)
    return torch.Size((shape[0], row // 2)) if row and row % 2 == 0 else torch.Size((-(-shape.numel() // 2),))


def blocksize_within_rows(shape: torch.Size, blocksize: int) -> int:
    """The largest power of two up to ``blocksize`` that divides a row, or 0 if it is less than what blocks may have."""
    while blocksize >= MIN_BLOCKSIZE and _row_size(shape) % blocksize:
        blocksize //= 2
    return blocksize if blocksize >= MIN_BLOCKSIZE else 0


def _row_size(shape: torch.Size) -> int:
    return shape[1:].numel() if len(shape) else 0


def _replace(segment: Segment, state: str, codes: Tensor, absmax: Tensor, keep: Tensor, blocksize: int) -> None:
    held, scales = segment.states[state], segment.states[absmax_key(state)]
    elements_a_byte = 2 if codes.numel() < keep.numel() else 1
    held.copy_(torch.where(keep[::elements_a_byte], codes, held))
    scales.copy_(torch.where(keep[::blocksize], absmax, scales))
