"""Load what another program quantized into a model that is already built."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_core.specs.check import short
from q_nn.layers import around, replace_module
from q_nn.linear import QuantizedLinear
from q_nn.linear_int8 import LinearInt8
from q_nn.load import representatives
from q_nn.readers.checks import refuse
from q_nn.readers.gguf import check_config
from q_nn.readers.grouped_weight import with_dtype
from q_nn.readers.read import read_weights
from q_nn.sharded import refuse_sharded
from q_nn.state_hooks import install

_NAMED_IN_ERRORS = 5

Slot = tuple[nn.Module, str, Tensor]
"""A module, the name of a tensor in it, and the tensor that is there now."""


def load_foreign(model: nn.Module, source: str | PathLike[str], *, requantize: WeightFormat | None = None) -> None:
    """Load a checkpoint of GPTQ, AWQ, compressed-tensors or GGUF into a model built from its config.

    Linear layers whose weight is quantized in the checkpoint are swapped for ours, whatever config.json says of others; an embedding holds
    a quantized weight itself. Weights keep the model's dtype and device; on the meta device they come alive on the CPU. What is tied stays
    tied. Activations are taken as they are, also where a checkpoint was made for a program that rounds them.

    A bias of zeros for a layer that has none is dropped: some writers of GPTQ add one to every layer.

    Args:
        model: on the meta device or any other; mutated. Buffers that no checkpoint holds must be real already.
        source: as for :func:`q_nn.read_weights`.
        requantize: likewise.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError, TypeError: as :func:`q_nn.read_weights`, or keys or shapes don't fit the model, or a layer can't hold a
            quantized weight, or the model is sharded; the message names it, and nothing is changed.
    """
    refuse_sharded("load_foreign", model, "load before fully_shard")
    slots = dict(_slots(model))
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in slots:
            refuse(f"load_foreign: buffer {name}", "is on the meta device and in no checkpoint", "it on a real one")
    if not Path(source).is_dir() and hasattr(model, "config"):
        check_config(Path(source), model.config)
    weights = read_weights(source, requantize=requantize)
    _drop_empty_biases(slots, weights)
    first = representatives(model, {key: tensor for key, (_, _, tensor) in slots.items()})
    values = {first[key]: _fit(key, slots[key], value) for key, value in weights.items() if key in slots}
    missing, unexpected = [key for key in slots if first[key] not in values], sorted(set(weights) - set(slots))
    if missing or unexpected:
        raise ValueError(f"load_foreign: missing keys: {_some(missing)}; unexpected keys: {_some(unexpected)}")
    swaps: dict[int, tuple[nn.Linear, nn.Linear]] = {}
    for key, (module, _, _) in slots.items():
        value = values[first[key]]
        if isinstance(value, QuantizedTensor) and module is model:
            refuse(f"load_foreign: {key}", "is the model's own", "a weight of a layer inside, in whose place another can be put")
        if isinstance(value, QuantizedTensor) and (linear := _linear(key, module)) is not None:
            swaps[id(module)] = linear, _around(linear, value)

    for old, new in swaps.values():
        replace_module(model, old, new)
    for key, (module, name, _) in slots.items():
        holder = swaps[id(module)][1] if id(module) in swaps else module
        setattr(holder, name, values[first[key]])
        if isinstance(values[first[key]], QuantizedTensor):
            install(holder)


def _slots(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    """All that a checkpoint must hold, by key."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), (module, name, tensor)


def _drop_empty_biases(slots: dict[str, Slot], weights: dict[str, Tensor]) -> None:
    for key in [key for key in weights if key not in slots and key.endswith(".bias")]:
        quantized = isinstance(weights.get(f"{key.removesuffix('bias')}weight"), QuantizedTensor)
        if quantized and not bool(weights[key].any()):
            del weights[key]


def _fit(key: str, slot: Slot, value: Tensor) -> Tensor:
    """The value as the slot wants it: a parameter or a buffer of its dtype and on its device."""
    module, name, target = slot
    if value.shape != target.shape:
        refuse(f"load_foreign: {key}", f"has shape {list(value.shape)}", str(list(target.shape)))
    if isinstance(value, QuantizedTensor):
        value = with_dtype(value, target.dtype)
    elif isinstance(target, QuantizedTensor):
        refuse(f"load_foreign: {key}", f"is plain, and the model's is held as {target.format}", "a model that isn't quantized yet")
    else:
        if value.is_floating_point() != target.is_floating_point():
            refuse(f"load_foreign: {key}", f"has dtype {short(value.dtype)}", f"one as {short(target.dtype)}")
        value = value.to(target.dtype)
        if name in module._parameters and not bool(torch.isfinite(value).all()):
            refuse(f"load_foreign: {key}", f"has elements that are NaN or infinite as {short(value.dtype)}", "finite ones")
    if not target.is_meta:
        value = value.to(target.device)
    if name not in module._parameters:
        return value
    return nn.Parameter(value, requires_grad=target.requires_grad and not isinstance(value, QuantizedTensor))


def _linear(key: str, module: nn.Module) -> nn.Linear | None:
    """The layer that wants another in its place for a quantized weight; ``None`` for an embedding, which holds one as it is."""
    if type(module) is nn.Embedding:
        return None
    if type(module) is nn.Linear or isinstance(module, QuantizedLinear):
        return module
    refuse(f"load_foreign: {key}", f"is quantized, and {type(module).__name__} holds it", "nn.Linear or nn.Embedding")


def _around(linear: nn.Linear, weight: QuantizedTensor) -> QuantizedLinear:
    if isinstance(weight.format, Int8Rows):  # which Linear8bitLt would round the activations for
        return LinearInt8._around(linear, weight)
    return around(linear, weight)


def _some(keys: list[str]) -> str:
    rest = len(keys) - _NAMED_IN_ERRORS
    return ", ".join(keys[:_NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "") if keys else "none"
