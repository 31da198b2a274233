"""The container of GGUF: metadata and where each tensor's bytes are. Versions 2 and 3, little-endian.

A file is not trusted: every length and count is held against the bytes that are left before anything is read or allocated for it.
(The specification is docs/gguf.md of the ggml project.)
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_AXES = 4
_MAX_NESTING = 2
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_SMALLEST = {_STRING: 8, _ARRAY: 12}
"""Bytes that a value takes at least."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a type of ggml lays a row out: ``bytes`` for each block of ``elements``."""

    name: str
    elements: int
    bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    8: Kind("Q8_0", 32, 34),
    12: Kind("Q4_K", 256, 144),
    30: Kind("BF16", 1, 2),
}
"""The types that are read, by their number in the file."""

_OTHER_KINDS = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file.

    Attributes:
        shape: the slowest axis first, as torch has it; the file has it the other way round.
        kind: how it is laid out.
        start: where its bytes begin in the file.
    """

    shape: tuple[int, ...]
    kind: Kind
    start: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.kind.elements * self.kind.bytes

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GGUFFile:
    """An open GGUF file.

    Attributes:
        metadata: values by key.
        entries: tensors by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF file, or is damaged, or of an unknown version, or holds a type of tensor that isn't read.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected a GGUF file")
        size = path.stat().st_size
        if size < 24:
            raise ValueError(f"{path}: has {size} bytes, expected a GGUF file, whose header alone has 24")
        with path.open("rb") as file:
            # Private pages: tensors over them may be written to, and the file isn't.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        parser = _Parser(path, self._bytes)
        self.metadata, self.entries = parser.header()

    def read(self, name: str) -> Tensor:
        """A tensor's bytes, uint8 [rows, bytes of a row], in memory of their own."""
        entry = self.entries[name]
        count = entry.rows * entry.row_bytes
        if not count:
            return torch.empty(entry.rows, entry.row_bytes, dtype=torch.uint8)
        mapped = torch.frombuffer(self._bytes, dtype=torch.uint8, count=count, offset=entry.start)
        return mapped.clone().view(entry.rows, entry.row_bytes)


class _Parser:
    """Reads from the front to the back, and never behind the end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._at = 0

    def header(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        if self._take(4) != _MAGIC:
            self._refuse("doesn't begin with 'GGUF'")
        version = self._number("<I")
        if version not in _VERSIONS:
            self._refuse(f"is of version {version}, expected one of {_VERSIONS}, little-endian")
        tensors, values = self._number("<Q"), self._number("<Q")
        # A tensor has a name of 8 bytes at least, a count of axes, a type and an offset; a value has a key, a type and a byte.
        self._check_count(tensors, 24, "tensors")
        self._check_count(values, 13, "metadata values")
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._string()
            if key in metadata:
                self._refuse(f"has the metadata key {key!r} twice")
            metadata[key] = self._value(self._number("<I"), key, 0)
        infos = [self._info() for _ in range(tensors)]
        return metadata, self._place(infos, metadata.get("general.alignment", 32))

    def _info(self) -> tuple[str, tuple[int, ...], Kind, int]:
        name = self._string()
        axes = self._number("<I")
        if not 0 < axes <= _MAX_AXES:
            self._refuse(f"has a tensor {name!r} of {axes} axes, expected 1 to {_MAX_AXES}")
        shape = tuple(self._number("<Q") for _ in range(axes))[::-1]
        if max(shape) > 2 * len(self._content):  # an element takes 4 bits at least; of no rows none may be endless either
            self._refuse(f"has a tensor {name!r} {list(shape)}, expected sizes that its {len(self._content)} bytes have room for")
        number, offset = self._number("<I"), self._number("<Q")
        if number not in KINDS:
            known = ", ".join(kind.name for kind in KINDS.values())
            self._refuse(f"has a tensor {name!r} of the type {_OTHER_KINDS.get(number, number)}, expected one of {known}")
        kind = KINDS[number]
        if shape[-1] % kind.elements:
            self._refuse(f"has a tensor {name!r} {list(shape)}, expected rows of whole {kind.name} blocks of {kind.elements}")
        return name, shape, kind, offset

    def _place(self, infos: list[tuple[str, tuple[int, ...], Kind, int]], alignment: object) -> dict[str, Entry]:
        """Where the tensors are, whose offsets count from the end of the header."""
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            self._refuse(f"has general.alignment {alignment!r}, expected a multiple of 8")
        start = -(-self._at // alignment) * alignment
        entries: dict[str, Entry] = {}
        for name, shape, kind, offset in infos:
            if name in entries:
                self._refuse(f"has the tensor {name!r} twice")
            entry = Entry(shape, kind, start + offset)
            if offset % alignment:
                self._refuse(f"has the tensor {name!r} at {offset}, expected a multiple of {alignment}")
            if entry.start + entry.rows * entry.row_bytes > len(self._content):
                self._refuse(
                    f"has the tensor {name!r} {list(shape)} up to byte {entry.start + entry.rows * entry.row_bytes}, "
                    f"expected it in the {len(self._content)} bytes of the file, which may be cut off"
                )
            entries[name] = entry
        return entries

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _MAX_NESTING:
            self._refuse(f"has a value of {key!r} of the type {kind}, expected one of GGUF's, at most {_MAX_NESTING} arrays deep")
        element, count = self._number("<I"), self._number("<Q")
        smallest = struct.calcsize(_SCALARS[element]) if element in _SCALARS else _SMALLEST.get(element, 1)
        self._check_count(count, smallest, f"elements of {key!r}")
        if element in _SCALARS:
            layout = f"<{count}{_SCALARS[element][1:]}"
            return list(struct.unpack(layout, self._take(struct.calcsize(layout))))
        return [self._value(element, key, depth + 1) for _ in range(count)]

    def _string(self) -> str:
        length = self._number("<Q")
        self._check_count(length, 1, "bytes of a string")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            self._refuse(f"has a string that isn't UTF-8 ({error})")

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _check_count(self, count: int, each: int, what: str) -> None:
        left = len(self._content) - self._at
        if count * each > left:
            self._refuse(f"says {count} {what}, of which {left} bytes have no room")

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._content):
            self._refuse(f"ends at byte {len(self._content)} in its header")
        self._at += count
        return self._content[self._at - count : self._at]

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self._path}: the file {what}, at byte {self._at}")
