"""What :func:`q_nn.quantize` did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_NAMED = 3


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """A module that was quantized.

    Attributes:
        name: of the module.
        kind: "linear layer", "embedding" or "fused experts".
        format: of the weights, in words.
        shapes: of the weights.
        bytes_before, bytes_after: of the weights.
        tied: names of the modules that share the weight, and were quantized with it.
    """

    name: str
    kind: str
    format: str
    shapes: tuple[tuple[int, ...], ...]
    bytes_before: int
    bytes_after: int
    tied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptParameter:
    """A parameter that was left as it was, and why."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What :func:`quantize` did: every parameter of the model is in one of the two lists, but the biases of quantized layers.

    Attributes:
        quantized: modules whose weights were quantized.
        kept: parameters that were not; one that is tied once for each module that holds it.
        bytes_before, bytes_after: of all parameters and buffers.
    """

    quantized: tuple[QuantizedLayer, ...]
    kept: tuple[KeptParameter, ...]
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, under the names of the attributes."""
        return asdict(self)

    def __str__(self) -> str:
        """A few lines for people: layers grouped by kind and format, parameters that were kept by reason."""
        count = sum(1 + len(layer.tied) for layer in self.quantized)
        lines = [f"quantized {count} layers: {self.bytes_before:,} bytes before, {self.bytes_after:,} after"]
        alike: dict[tuple[str, str], list[QuantizedLayer]] = defaultdict(list)
        for layer in self.quantized:
            alike[layer.kind, layer.format].append(layer)
        for (kind, format), layers in alike.items():
            names = [name for layer in layers for name in (layer.name, *layer.tied)]
            before, after = (sum(getattr(layer, which) for layer in layers) for which in ("bytes_before", "bytes_after"))
            lines.append(f"{kind} to {format}, {len(names)} ({before:,} bytes to {after:,}): {_some(names)}")
        by_reason: dict[str, list[KeptParameter]] = defaultdict(list)
        for parameter in self.kept:
            by_reason[parameter.reason].append(parameter)
        for reason, parameters in by_reason.items():
            total = sum(parameter.bytes for parameter in parameters)
            lines.append(
                f"kept {len(parameters)} ({total:,} bytes), {reason}: {_some([parameter.name for parameter in parameters])}"
            )
        return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
