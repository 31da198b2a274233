"""What becomes of a checkpoint's tensors on their way into a model, as operations of transformers' loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from q_core.formats.checkpoint import from_flat, to_flat
from q_core.formats.four_bit import NESTED_BLOCKSIZE, FourBit
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.hf.plan import Plan

Tensors = dict[str, Any]
"""Tensors, or lists of one, by a parameter's name or by the pattern that their checkpoint's key matched."""


class _Operation(ConversionOps):  # type: ignore[misc]
    """An operation that knows the plan. The loader copies operations once a parameter; the copies share it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.plan)


class Quantize(_Operation):
    """Quantizes dense tensors that the plan wants quantized."""

    def convert(self, input_dict: Tensors, *_: Any, **__: Any) -> Tensors:
        """Parameters by name, of dense tensors by name."""
        return {name: self._parameter(name, _single(name, value)) for name, value in input_dict.items()}

    def _parameter(self, name: str, dense: Tensor) -> Tensor:
        format = self.plan.formats.get(name)
        return dense if format is None else nn.Parameter(QuantizedTensor.quantize(dense, format), requires_grad=False)


class Assemble(_Operation):
    """Puts a quantized parameter together from the tensors that a checkpoint holds it in.

    The loader hands it all tensors whose keys look like such parts, plain weights too.
    """

    dtype: torch.dtype | None = None
    """What the loader would have cast a float tensor to, had we let it: scales must stay as they are."""

    def convert(self, input_dict: Tensors, *_: Any, full_layer_name: str, target_patterns: list[str], **__: Any) -> Tensors:
        """One parameter by the pattern of its name, of tensors by the patterns of their keys."""
        (target,) = target_patterns
        stem, _, own = full_layer_name.rpartition(".")
        state = {f"{stem}{_literal(pattern)}": _single(pattern, value) for pattern, value in input_dict.items()}
        assert target == f".{own}"
        plain = state.get(full_layer_name) if len(state) == 1 else None
        if plain is not None and plain.is_floating_point():
            if full_layer_name in self.plan.formats:
                raise ValueError(f"{full_layer_name} is {plain.dtype}, but config.json says that it is quantized")
            return {target: plain.to(self.dtype)}
        loaded = from_flat(full_layer_name, state, dtype=self.dtype)
        if full_layer_name not in self.plan.formats:
            raise ValueError(f"{full_layer_name} is held as {loaded.format}, but config.json doesn't say that it is quantized")
        return {target: nn.Parameter(loaded if self.dtype is None else loaded.to(self.dtype), requires_grad=False)}


def assembling_converters(plan: Plan) -> list[WeightConverter]:
    """Converters that find the parts of quantized parameters in a checkpoint, one for each name that such parameters have."""
    names = sorted({name.rpartition(".")[2] for name in plan.formats})
    return [WeightConverter([_pattern(part) for part in _parts(name)], f".{name}", [Assemble(plan)]) for name in names]


def _parts(name: str) -> Iterable[str]:
    """The keys that parts of a parameter may have, in any format, after the name of its module."""
    formats = [FourBit(quant_type, 64, nested) for quant_type in ("nf4", "fp4") for nested in (None, NESTED_BLOCKSIZE)]
    parts: dict[str, None] = {}
    for format in (*formats, *([Int8Rows()] if name == "weight" else [])):
        empty = QuantizedTensor.empty((2, 64), format, dtype=torch.float32, device="meta")
        parts.update(dict.fromkeys(to_flat(f".{name}", empty)))
    return parts


def _pattern(part: str) -> str:
    """A regular expression for keys that end so."""
    return part.replace(".", r"\.") + "$"


def _literal(pattern: str) -> str:
    return pattern.replace(r"\.", ".").removesuffix("$")


def _single(name: str, value: Tensor | list[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if len(value) != 1:
        raise ValueError(f"{name}: the checkpoint holds it {len(value)} times, expected once")
    return value[0]
