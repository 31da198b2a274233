"""The ``quantization_config`` of a Hugging Face config.json: in transformers' dialect for bitsandbytes, or in our own.

Ours is a :class:`q_nn.QConfig`, as ``to_dict`` writes it. It is for what the other has no words for: several formats in one model, other
formats, experts, embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from q_core.formats.four_bit import NESTED_BLOCKSIZE, FourBit
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_nn.describe import describe, quantized_weights
from q_nn.linear8bit import Linear8bitLt, check_threshold
from q_nn.outlier_aware import OutlierAwareLinear
from q_nn.patterns import check_patterns, matching

_QUANT_TYPES = ("nf4", "fp4")
_DEFAULT_THRESHOLD = 6.0
_SAVED_BLOCKSIZE = 64
"""What the dialect leaves out because it never differs; the checkpoint itself says it again, and is believed."""

_KNOWN = {
    "quant_method",
    "load_in_4bit",
    "load_in_8bit",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_has_fp16_weight",
    "llm_int8_enable_fp32_cpu_offload",  # where transformers puts modules
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",  # our products take the activations' dtype and sum in float32 whatever it is
    "bnb_4bit_quant_storage",  # the dtype that the codes' bytes are viewed as, which a tensor says itself
    "_load_in_4bit",
    "_load_in_8bit",
}


@dataclass(frozen=True, slots=True)
class BitsAndBytesConfig:
    """What of a ``quantization_config`` matters here.

    Attributes:
        format: of the quantized weights; the blocksize is what checkpoints use, each weight may say another.
        threshold, has_fp16_weights: of int8 layers, see :class:`q_nn.Linear8bitLt`.
        skip: patterns of module names (:mod:`q_nn.patterns`); ``None`` for transformers' defaults.
    """

    format: WeightFormat
    skip: tuple[str, ...] | None
    threshold: float = 0.0
    has_fp16_weights: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BitsAndBytesConfig:
        """Read the dialect.

        Raises:
            ValueError, TypeError: a key is unknown, or a value isn't supported; the message names it.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"quantization_config is {type(config).__name__}, expected an object")
        if config.get("quant_method") != "bitsandbytes":
            raise ValueError(f"quantization_config: quant_method is {config.get('quant_method')!r}, expected 'bitsandbytes'")
        if unknown := sorted(set(config) - _KNOWN):
            raise ValueError(f"quantization_config: unknown keys {unknown}, expected some of {sorted(_KNOWN)}")
        four, eight = (_flag(config, key, default=False) for key in ("load_in_4bit", "load_in_8bit"))
        if four == eight:
            raise ValueError(f"quantization_config: load_in_4bit is {four} and load_in_8bit is {eight}, expected one of them")
        skip = config.get("llm_int8_skip_modules")
        if skip is not None:
            skip = check_patterns("quantization_config: llm_int8_skip_modules", skip)
        dense = _flag(config, "llm_int8_has_fp16_weight", default=False)
        if eight:
            threshold = check_threshold(
                "quantization_config: llm_int8_threshold", config.get("llm_int8_threshold", _DEFAULT_THRESHOLD)
            )
            return cls(Int8Rows(), skip, threshold, dense)
        if dense:
            raise ValueError("quantization_config: llm_int8_has_fp16_weight is true, expected false with load_in_4bit")
        nested = _flag(config, "bnb_4bit_use_double_quant", default=False)
        quant_type = config.get("bnb_4bit_quant_type", "fp4")
        if quant_type not in _QUANT_TYPES:
            raise ValueError(f"quantization_config: bnb_4bit_quant_type is {quant_type!r}, expected one of {_QUANT_TYPES}")
        return cls(FourBit(quant_type, _SAVED_BLOCKSIZE, NESTED_BLOCKSIZE if nested else None), skip)


def quantization_config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any] | None:
    """Describe a model's quantized layers: in bitsandbytes' dialect if that can say it, else in ours; ``None`` if it has none.

    Args:
        model: any.
        dtype: of the activations.

    Raises:
        ValueError: a weight is held in a way that neither has words for.
    """
    if aware := [name for name, module in model.named_modules() if isinstance(module, OutlierAwareLinear)]:
        raise ValueError(f"save_pretrained: {aware[0]} is an OutlierAwareLinear, which config.json can't say; save the state dict")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, Linear8bitLt) or isinstance(layer.weight, QuantizedTensor)
    }
    if not quantized:
        described = describe(model)
        return None if described is None else described.to_dict()
    kinds = {_kind(layer) for layer in quantized.values()}
    if len(kinds) > 1 or not _all_in_dialect(model):
        described = describe(model)
        assert described is not None
        return described.to_dict()
    (settings,) = kinds
    return {
        "quant_method": "bitsandbytes",
        **dict(settings),
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [_name_exactly(name, quantized) for name in layers if name not in quantized],
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def _all_in_dialect(model: nn.Module) -> bool:
    """Whether all that is quantized are linear layers in formats of bitsandbytes', which has no int8 for weights alone."""
    for module in model.modules():
        formats = [weight.format for weight in quantized_weights(module).values()]
        if formats and not isinstance(module, nn.Linear):
            return False
        for format in formats:
            four_bit = isinstance(format, FourBit) and format.quant_type in _QUANT_TYPES
            if not four_bit and not isinstance(module, Linear8bitLt):
                return False
    return True


def _kind(layer: nn.Linear) -> tuple[tuple[str, Any], ...]:
    """The settings that all layers must share."""
    weight = layer.weight
    if isinstance(weight, QuantizedTensor) and isinstance(weight.format, FourBit):
        return (
            ("load_in_4bit", True),
            ("load_in_8bit", False),
            ("bnb_4bit_quant_type", weight.format.quant_type),
            ("bnb_4bit_use_double_quant", weight.format.nested_blocksize is not None),
            ("llm_int8_has_fp16_weight", False),
        )
    # Int8 for weights alone, which is none of the dialect's, differs from all of them.
    rounds = isinstance(layer, Linear8bitLt)
    return (
        ("load_in_4bit", False),
        ("load_in_8bit", rounds),
        ("llm_int8_threshold", layer.threshold if rounds else 0.0),
        ("llm_int8_has_fp16_weight", rounds and layer.has_fp16_weights),
    )


def _name_exactly(name: str, quantized: Mapping[str, nn.Module]) -> str:
    """A pattern that means this module and none that is quantized."""
    if any(matching(other, (name,)) for other in quantized):
        return re.escape(name) + "$"
    return name


def _flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise TypeError(f"quantization_config: {key} is {value!r}, expected true or false")
    return value
