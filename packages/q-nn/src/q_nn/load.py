"""Load a Hugging Face directory into a model that is already built."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from q_core.formats.checkpoint import flat_keys, from_flat
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.specs.check import short
from q_nn.checkpoint import Checkpoint
from q_nn.config import QUANT_METHOD, QConfig
from q_nn.convert import rebuild
from q_nn.describe import describe
from q_nn.hf_config import BitsAndBytesConfig
from q_nn.layers import replace_module
from q_nn.plan import PlannedLayer, plan_quantization
from q_nn.replace import plan_replacements
from q_nn.sharded import refuse_sharded
from q_nn.state_hooks import accepts
from q_nn.weights import read_config

_NAMED_IN_ERRORS = 5


def load_into(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Load the weights of a Hugging Face directory, quantized or not, into a model built from its config.

    Modules that the config says are quantized are swapped first (:func:`q_nn.replace_linears`; :class:`q_nn.QConfig` for our own dialect).
    Parameters are replaced, not copied into: they keep the model's dtype and device, but on the meta device they come alive on the CPU.
    Tied parameters stay tied. Keys that transformers 5 renames, and tensors an expert that it stacks, are read as it reads them.
    What GPTQ, AWQ or compressed-tensors quantized is read by :func:`q_nn.load_foreign`.

    Tensors are read one at a time, and the model is changed when all of them are there. So the peak is the new weights beside the old ones,
    and a model whose parameters are on the meta device (accelerate's ``init_empty_weights`` makes one) is held once.

    Args:
        model: on the meta device or any other; mutated. Buffers that no checkpoint holds must be real already.
        directory: holds config.json and model.safetensors, or an index of several such files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says, or keys, shapes or formats don't fit the model, or a weight isn't finite, or the model
            is sharded; the message names them, and nothing is changed.
    """
    refuse_sharded("load_into", model, "load before fully_shard")
    source = Path(directory)
    config = read_config(source)
    from q_nn.readers import load_foreign, quantized_elsewhere  # which take from this module

    if quantized_elsewhere(config.get("quantization_config")):
        load_foreign(model, source)
        return
    swaps = plan_swaps(model, config.get("quantization_config"))
    slots = slots_of(model, swaps)
    _check_all_real(model, slots)
    tensors = {key: tensor for key, (_, _, tensor) in slots.items()}
    values = _fit(slots, representatives(model, tensors), Checkpoint(source, model, tensors))

    for old, new in swaps.values():
        replace_module(model, old, new)
    for key, (module, name, _) in slots.items():
        setattr(module, name, values[key])


Slot = tuple[nn.Module, str, Tensor]
"""A module, the name of a tensor in it, and the tensor that is there now."""

Swaps = dict[str, tuple[nn.Module, nn.Module]]
"""Modules and what is to take their places, by name."""


def plan_swaps(model: nn.Module, quantization_config: Mapping[str, Any] | None) -> Swaps:
    """The modules that must make place for quantized ones, which are empty, before a checkpoint with this config fits; nothing is changed.

    Raises:
        ValueError, TypeError: the config is in no dialect that is known, or contradicts itself or the model.
    """
    if quantization_config is None:
        return {}
    if not isinstance(quantization_config, Mapping) or quantization_config.get("quant_method") != QUANT_METHOD:
        return {**plan_replacements(model, BitsAndBytesConfig.from_dict(quantization_config))}
    config = QConfig.from_dict(quantization_config)
    if describe(model) == config:
        return {}
    swaps: Swaps = {}
    for layer in plan_quantization(model, config).layers:
        weights = empty_weights(model.get_submodule(layer.names[0]), layer)
        for name, rule in zip(layer.names, layer.rules, strict=True):
            old = model.get_submodule(name)
            new = rebuild(old, weights, rule)
            swaps[name] = old, new
            shared = swaps[layer.names[0]][1]._parameters
            new._parameters.update({own: shared[own] for own in weights})  # one parameter where modules share it
    return swaps


def empty_weights(module: nn.Module, layer: PlannedLayer) -> dict[str, QuantizedTensor]:
    """The weights of a module that is planned to be quantized, to be loaded into."""
    format = layer.rules[0].weight_format()
    assert format is not None
    dense = {own: module.get_parameter(own) for own in layer.kind.weights}
    return {own: QuantizedTensor.empty(p.shape, format, dtype=p.dtype, device=p.device) for own, p in dense.items()}


def slots_of(model: nn.Module, swaps: Swaps) -> dict[str, Slot]:
    """All that a checkpoint must hold, by key, as it will be after the swaps."""
    future = {id(old): new for old, new in swaps.values()}
    slots: dict[str, Slot] = {}
    for prefix, present in model.named_modules(remove_duplicate=False):
        module: nn.Module = future.get(id(present), present)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                slots[f"{prefix}.{name}".lstrip(".")] = module, name, tensor
    return slots


def representatives(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, str]:
    """For each key the first one that it is tied to, itself if to none: a tied tensor is written under one of its names."""
    # transformers declares what it ties; on the meta device those aren't one object yet.
    declared = {key: source for key, source in getattr(model, "all_tied_weights_keys", {}).items() if source in tensors}
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        first.setdefault(id(tensor), key)
    return {key: first[id(tensors[declared.get(key, key)])] for key in tensors}


def check_keys(what: str, tied: dict[str, str], checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that doesn't hold each of a model's tensors, or holds more.

    Args:
        what: begins the message.
        tied: :func:`representatives` of the model's keys.
        checkpoint: of that model.
    """
    held = {tied[key] for key in tied if key in checkpoint.headers}
    missing = [key for key in tied if tied[key] not in held]
    used = {own for key in tied if key in checkpoint.headers for own in flat_keys(key, checkpoint.headers) or (key,)}
    unexpected = sorted({*checkpoint.unexpected, *(set(checkpoint.headers) - used)})
    if missing or unexpected:
        raise ValueError(f"{what}: missing keys: {_some(missing)}; unexpected keys: {_some(unexpected)}")


def _fit(slots: dict[str, Slot], tied: dict[str, str], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What goes into each slot, one tensor for those that are tied. What headers say is checked before anything is read."""
    check_keys("load_into", tied, checkpoint)
    for key, slot in slots.items():
        if key in checkpoint.headers:
            check_header("load_into", key, slot[2], checkpoint.headers)
    values: dict[str, Tensor] = {}
    for key, slot in slots.items():
        if key in checkpoint.headers and tied[key] not in values:
            values[tied[key]] = _value(key, slot, checkpoint)
    return {key: values[tied[key]] for key in slots}


def check_header(what: str, key: str, target: Tensor, headers: Mapping[str, Tensor]) -> None:
    """Refuse a tensor that can't be what is wanted at its key, before it is read. Of quantized ones that is for ``from_flat`` to say."""
    if isinstance(target, QuantizedTensor):
        return
    header = headers[key]
    if flat_keys(key, headers):
        raise ValueError(f"{what}: {key} is quantized, but config.json doesn't say so of {key.rpartition('.')[0]}")
    if header.shape != target.shape:
        raise ValueError(f"{what}: {key} has shape {list(header.shape)}, expected {list(target.shape)}")
    if header.is_floating_point() != target.is_floating_point():
        raise ValueError(f"{what}: {key} has dtype {short(header.dtype)}, expected one as {short(target.dtype)}")


def _value(key: str, slot: Slot, checkpoint: Checkpoint) -> Tensor:
    """What the checkpoint holds at a key, as the slot wants it: a parameter or a buffer of its dtype and on its device."""
    module, name, target = slot
    state = checkpoint.read_weight(key)
    value: Tensor
    if isinstance(target, QuantizedTensor):
        value = from_flat(key, state, dtype=target.dtype)
        assert isinstance(value, QuantizedTensor)
        if not accepts(module, value.format):
            raise ValueError(f"load_into: {key} is held as {value.format}, expected what {type(module).__name__} takes")
        if value.shape != target.shape:
            raise ValueError(f"load_into: {key} has shape {list(value.shape)}, expected {list(target.shape)}")
        value = value.to(target.dtype)
    else:
        value = state[key].to(target.dtype)
        if name in module._parameters:  # a buffer may hold a mask
            check_finite("load_into", key, value)
    if not target.is_meta:
        value = value.to(target.device)
    return nn.Parameter(value, requires_grad=target.requires_grad) if name in module._parameters else value


@torch.no_grad()
def check_finite(what: str, name: str, tensor: Tensor) -> None:
    """Refuse a dense weight with elements that are NaN or infinite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{what}: {name} has {count} elements that are NaN or infinite as {short(tensor.dtype)}, expected finite ones"
        )


def _check_all_real(model: nn.Module, slots: dict[str, Slot]) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in slots:
            raise ValueError(f"load_into: buffer {name} is on the meta device and in no checkpoint; build it on a real one")


def _some(keys: list[str]) -> str:
    rest = len(keys) - _NAMED_IN_ERRORS
    return ", ".join(keys[:_NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "") if keys else "none"
