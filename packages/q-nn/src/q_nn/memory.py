"""How much memory a model takes, and what of it is quantized, trained or kept for speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.sharding import is_dtensor
from q_core.specs.check import short
from q_nn.table import table

TensorKind = Literal["quantized", "trainable", "frozen", "buffer"]


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Tensors of modules of one class that are held in one way.

    Attributes:
        module: the class.
        format: of quantized weights as :class:`q_nn.QuantizedTensor` has it, of others the dtype.
        kind: "quantized" parameters, dense ones that are "trainable" or "frozen", or "buffer".
        tensors, elements: how many.
        bytes: what they take.
        gradient_bytes: what their gradients take now.
        cached_bytes: what is kept beside them for speed, see :attr:`QuantizedTensor.cached_bytes`.
    """

    module: str
    format: str
    kind: TensorKind
    tensors: int
    elements: int
    bytes: int
    gradient_bytes: int
    cached_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What :func:`memory_report` found: each tensor in one row, with the first module that holds it. The largest rows come first."""

    rows: tuple[MemoryRow, ...]

    @property
    def weight_bytes(self) -> int:
        """Of all parameters and buffers, as :func:`weight_bytes` counts them."""
        return sum(row.bytes for row in self.rows)

    @property
    def gradient_bytes(self) -> int:
        return sum(row.gradient_bytes for row in self.rows)

    @property
    def cached_bytes(self) -> int:
        return sum(row.cached_bytes for row in self.rows)

    def bytes_of(self, kind: TensorKind) -> int:
        """Of all tensors of a kind."""
        return sum(row.bytes for row in self.rows if row.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        """A table for people."""
        head = ("module", "held as", "", "tensors", "elements", "bytes", "gradients", "cached")
        lines = [
            (row.module, row.format, row.kind, row.tensors, row.elements, row.bytes, row.gradient_bytes, row.cached_bytes)
            for row in self.rows
        ]
        sums = (sum(row.tensors for row in self.rows), sum(row.elements for row in self.rows))
        total = ("total", "", "", *sums, self.weight_bytes, self.gradient_bytes, self.cached_bytes)
        return table(head, [*lines, total])


def memory_report(model: nn.Module) -> MemoryReport:
    """Say what the parameters and buffers of a model take, by class of module and by how they are held.

    Args:
        model: on any device; of one on the meta device, what it would take. Of parameters that are sharded, this process's part counts.
    """
    sums: dict[tuple[str, str, TensorKind], list[int]] = {}
    for module, tensor, kind in _tensors(model):
        local = _local(tensor)
        quantized = isinstance(local, QuantizedTensor)
        format = str(local.format) if isinstance(local, QuantizedTensor) else short(local.dtype)
        counts = sums.setdefault((type(module).__name__, format, "quantized" if quantized else kind), [0] * 5)
        gradient = 0 if tensor.grad is None else tensor_bytes(tensor.grad)
        cached = local.cached_bytes if isinstance(local, QuantizedTensor) else 0
        for place, count in enumerate((1, local.numel(), tensor_bytes(local), gradient, cached)):
            counts[place] += count
    rows = [MemoryRow(*names, *counts) for names, counts in sums.items()]
    return MemoryReport(tuple(sorted(rows, key=lambda row: -row.bytes)))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, each counted once; of quantized ones what they store.

    Of parameters that are sharded it counts this process's part.
    """
    return sum(tensor_bytes(tensor) for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, of a quantized one what it stores, of a sharded one this process's part."""
    tensor = _local(tensor)
    return tensor.stored_bytes if isinstance(tensor, QuantizedTensor) else tensor.nbytes


def _local(tensor: Tensor) -> Tensor:
    if is_dtensor(tensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, TensorKind]]:
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, parameter, "trainable" if parameter.requires_grad else "frozen"
        for buffer in module.buffers(recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield module, buffer, "buffer"
