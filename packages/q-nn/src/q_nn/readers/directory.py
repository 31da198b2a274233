"""Weights of a Hugging Face directory that another program quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from q_core.formats.weight_format import WeightFormat
from q_nn.readers.awq import AWQ
from q_nn.readers.checks import Parts, refuse
from q_nn.readers.compressed_tensors import CompressedTensors
from q_nn.readers.gptq import GPTQ
from q_nn.readers.grouped_weight import GroupedWeight
from q_nn.weights import Weights, read_config


class Reader(Protocol):
    """A quantization method with the settings of one checkpoint."""

    @property
    def marker(self) -> str:
        """The last part of a key that every quantized layer has."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The last parts of all keys that a quantized layer may have for its weight."""

    def read(self, layer: Parts) -> GroupedWeight:
        """Read the weight of a layer."""


READERS: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
    "gptq": GPTQ.from_dict,
    "awq": AWQ.from_dict,
    "compressed-tensors": CompressedTensors.from_dict,
}
"""What reads a ``quantization_config``, by its ``quant_method``."""


def quantized_elsewhere(config: object) -> bool:
    """Whether a ``quantization_config`` is of a method that is read here."""
    return isinstance(config, Mapping) and config.get("quant_method") in tuple(READERS)


def reader_for(config: object) -> Reader:
    """The reader for a ``quantization_config``.

    Raises:
        ValueError, TypeError: its method isn't known, or a setting isn't; the message names it.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"quantization_config is {type(config).__name__}, expected an object")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        refuse("quantization_config: quant_method", f"is {method!r}", f"one of {tuple(READERS)}, or for load_into 'bitsandbytes'")
    return READERS[method](config)


def read_directory(directory: Path, dtype: torch.dtype | None, requantize: WeightFormat | None) -> dict[str, Tensor]:
    """All tensors of a directory by their keys in the model; see :func:`q_nn.read_weights`."""
    reader = reader_for(read_config(directory).get("quantization_config"))
    weights = Weights(directory)
    modules: dict[str, list[str]] = {
        name: [] for key in sorted(weights.headers) for name, _, part in [key.rpartition(".")] if part == reader.marker
    }
    if not modules:
        refuse(str(directory), f"holds no tensor *.{reader.marker}", "some, by config.json")
    result: dict[str, Tensor] = {}
    for key in sorted(weights.headers):
        module, _, part = key.rpartition(".")
        if module in modules and part in reader.parts:
            modules[module].append(part)
        elif module in modules and part != "bias":
            refuse(key, "is there", f"of a quantized layer {', '.join(reader.parts)} and bias")
        else:
            result[key] = weights.read(key)
    for module, parts in modules.items():
        layer = Parts(module, {part: weights.read(f"{module}.{part}") for part in parts})
        result[f"{module}.weight"] = reader.read(layer).quantized(dtype, requantize)
    return result
