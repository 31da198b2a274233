"""What becomes of a checkpoint's tensors on their way into a model, as operations of transformers' loader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from q_core.formats.checkpoint import from_flat, to_flat
from q_core.formats.codebooks import FOUR_BIT_BOOKS, FourBitType
from q_core.formats.four_bit import NESTED_BLOCKSIZE, FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WEIGHT_DTYPES, WeightFormat
from q_nn.hf.plan import Plan

Tensors = dict[str, Any]
"""Tensors, or lists of one, by a parameter's name or by the pattern that their checkpoint's key matched."""


_DOUBLE_QUANTIZED: tuple[FourBitType, ...] = ("nf4", "fp4", "int4")

FORMATS: tuple[WeightFormat, ...] = (
    *(FourBit(quant_type, FOUR_BIT_BOOKS[quant_type].blocksizes[0]) for quant_type in get_args(FourBitType)),
    *(FourBit(quant_type, 64, NESTED_BLOCKSIZE) for quant_type in _DOUBLE_QUANTIZED),
    Int8Rows(),
    Fp8Rows(),
)
"""One of each kind that checkpoints have keys for."""


class Quantize(ConversionOps):
    """Quantizes dense tensors that the plan wants quantized."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def convert(self, input_dict: Tensors, source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> Tensors:
        """Parameters by name, of dense tensors by name."""
        return {name: self._parameter(name, _single(name, value), kwargs["model"]) for name, value in input_dict.items()}

    def _parameter(self, name: str, dense: Tensor, model: nn.Module) -> Tensor:
        format = self.plan.formats.get(name)
        if format is None:
            return dense
        _check_shape(name, dense, model)
        return nn.Parameter(QuantizedTensor.quantize(dense, format), requires_grad=False)


class Assemble(ConversionOps):
    """Puts a quantized parameter together from the tensors that a checkpoint holds it in.

    The loader hands it whatever looks like such a tensor: the plain weights, too, of modules that are called as quantized ones are.

    Args:
        plan: what is to be quantized.
        parts: the key that each pattern is for, by pattern.
    """

    def __init__(self, plan: Plan, parts: Mapping[str, str]) -> None:
        self.plan, self.parts = plan, parts
        self.dtype: torch.dtype | None = None
        """What the loader would have cast float tensors to, had we let it: scales must stay as they are."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Assemble:
        return Assemble(self.plan, self.parts)  # the loader copies it once a parameter

    def convert(self, input_dict: Tensors, source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> Tensors:
        """One parameter by the end of its name, of tensors by the patterns of their keys."""
        (target,) = target_patterns
        name: str = kwargs["full_layer_name"]
        prefix = name.removesuffix(target)
        state = {prefix + self.parts[pattern]: _single(pattern, value) for pattern, value in input_dict.items()}
        planned = name in self.plan.formats
        value = state.get(name)
        if value is not None and len(state) == 1 and value.dtype in WEIGHT_DTYPES:
            if planned:
                raise ValueError(f"{name} is {value.dtype}, but config.json says that it is quantized")
            return {target: value.to(self.dtype)}
        loaded = from_flat(name, state, dtype=self.dtype)
        if not planned:
            raise ValueError(f"{name} is held as {loaded.format}, but config.json doesn't say that it is quantized")
        _check_shape(name, loaded, kwargs["model"])
        return {target: nn.Parameter(loaded if self.dtype is None else loaded.to(self.dtype), requires_grad=False)}


def assembling_converters(plan: Plan) -> list[WeightConverter]:
    """Converters that find the parts of quantized parameters in a checkpoint.

    There is one for all parameters whose names end alike, such as "q_proj.weight": what that end matches in a key, it replaces. The first
    that matches a key gets it: "experts.down_proj.SCB" is of the stacked "experts.down_proj", before it can be of a "down_proj.weight".
    """
    ends = {".".join(name.split(".")[-2:]) for name in plan.formats}
    return [_converter(plan, end) for end in sorted(ends, key=lambda end: (end.endswith(".weight"), end))]


def _converter(plan: Plan, end: str) -> WeightConverter:
    parts = {rf"(?<![^.]){re.escape(key)}$": key for key in _keys(end)}
    return WeightConverter(list(parts), end, [Assemble(plan, parts)])


def _keys(key: str) -> list[str]:
    """The keys that a checkpoint may hold a parameter in, whatever its format."""
    keys: dict[str, None] = {}
    for format in FORMATS:
        keys.update(dict.fromkeys(to_flat(key, QuantizedTensor.empty((2, 64), format, dtype=torch.float32, device="meta"))))
    return list(keys)


def _check_shape(name: str, tensor: Tensor, model: nn.Module) -> None:
    """Refuse what isn't of the model's shape; of quantized parameters the loader doesn't look at it."""
    expected = model.get_parameter(name).shape
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")


def _single(name: str, value: Tensor | list[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if len(value) != 1:
        raise ValueError(f"{name}: the checkpoint holds it {len(value)} times, expected once")
    return value[0]
