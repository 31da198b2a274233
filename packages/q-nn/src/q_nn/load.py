"""Load a Hugging Face directory into a model that is already built."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from q_core.formats.checkpoint import flat_keys, from_flat
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.hf_config import BitsAndBytesConfig
from q_nn.layers import replace_module
from q_nn.replace import plan_replacements
from q_nn.save import CONFIG, INDEX, WEIGHTS
from q_nn.sharded import refuse_sharded
from q_nn.state_hooks import accepts

_NAMED_IN_ERRORS = 5


def load_into(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Load the weights of a Hugging Face directory, quantized or not, into a model built from its config.

    Linear layers that the config says are quantized are swapped first (:func:`q_nn.replace_linears`). Parameters are replaced, not copied
    into: they keep the model's dtype and device, but on the meta device they come alive on the CPU. Tied parameters stay tied.

    Args:
        model: on the meta device or any other; mutated. Buffers that no checkpoint holds must be real already.
        directory: holds config.json and model.safetensors, or an index of several such files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says, or keys, shapes or formats don't fit the model, or the model is sharded; the message
            names them, and nothing is changed.
    """
    refuse_sharded("load_into", model, "load before fully_shard")
    source = Path(directory)
    config = _read_json(source / CONFIG)
    swaps: dict[str, tuple[nn.Linear, nn.Linear]] = {}
    if config.get("quantization_config") is not None:
        swaps = plan_replacements(model, BitsAndBytesConfig.from_dict(config["quantization_config"]))
    slots = dict(_slots(model, swaps))
    _check_all_real(model, slots)
    values = _fit(slots, _representatives(model, slots), _read_weights(source))

    for old, new in swaps.values():
        replace_module(model, old, new)
    for key, (module, name, _) in slots.items():
        setattr(module, name, values[key])


Slot = tuple[nn.Module, str, Tensor]
"""A module, the name of a tensor in it, and the tensor that is there now."""


def _slots(model: nn.Module, swaps: dict[str, tuple[nn.Linear, nn.Linear]]) -> Iterator[tuple[str, Slot]]:
    """All that a checkpoint must hold, by key, as it will be after the swaps."""
    future = {id(old): new for old, new in swaps.values()}
    for prefix, present in model.named_modules(remove_duplicate=False):
        module: nn.Module = future.get(id(present), present)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), (module, name, tensor)


def _representatives(model: nn.Module, slots: dict[str, Slot]) -> dict[str, str]:
    """For each key the first one that it is tied to, itself if to none: a tied tensor is written under one of its names."""
    # transformers declares what it ties; on the meta device those aren't one object yet.
    declared = {key: source for key, source in getattr(model, "all_tied_weights_keys", {}).items() if source in slots}
    first: dict[int, str] = {}
    for key, (_, _, tensor) in slots.items():
        first.setdefault(id(tensor), key)
    return {key: first[id(slots[declared.get(key, key)][2])] for key in slots}


def _fit(slots: dict[str, Slot], representatives: dict[str, str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What goes into each slot, one tensor for those that are tied. Raises unless every slot is filled and every key used."""
    values: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, slot in slots.items():
        if key in state:
            used.update(flat_keys(key, state) or (key,))
            values.setdefault(representatives[key], _value(key, slot, state))
    missing = [key for key in slots if representatives[key] not in values]
    unexpected = sorted(set(state) - used)
    if missing or unexpected:
        raise ValueError(f"load_into: missing keys: {_some(missing)}; unexpected keys: {_some(unexpected)}")
    return {key: values[representatives[key]] for key in slots}


def _value(key: str, slot: Slot, state: dict[str, Tensor]) -> Tensor:
    """What the checkpoint holds at a key, as the slot wants it: a parameter or a buffer of its dtype and on its device."""
    module, name, target = slot
    value: Tensor
    if isinstance(target, QuantizedTensor):
        value = from_flat(key, state, dtype=target.dtype)
        assert isinstance(value, QuantizedTensor)
        if not accepts(module, value.format):
            raise ValueError(f"load_into: {key} is held as {value.format}, expected what {type(module).__name__} takes")
        value = value.to(target.dtype)
    elif flat_keys(key, state):
        raise ValueError(f"load_into: {key} is quantized, but config.json doesn't say so of {key.rpartition('.')[0]}")
    else:
        value = state[key].to(target.dtype)
    if value.shape != target.shape:
        raise ValueError(f"load_into: {key} has shape {list(value.shape)}, expected {list(target.shape)}")
    if not target.is_meta:
        value = value.to(target.device)
    return nn.Parameter(value, requires_grad=target.requires_grad) if name in module._parameters else value


def _check_all_real(model: nn.Module, slots: dict[str, Slot]) -> None:
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in slots:
            raise ValueError(f"load_into: buffer {name} is on the meta device and in no checkpoint; build it on a real one")


def _read_weights(source: Path) -> dict[str, Tensor]:
    single, index = source / WEIGHTS, source / INDEX
    if single.exists() or not index.exists():
        return _read_tensors(single)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map is {type(weight_map).__name__}, expected file names by key")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: weight_map names {name!r}, expected a file in the same directory")
        tensors.update(_read_tensors(source / name))
    return tensors


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected weights in safetensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a Hugging Face model directory")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is JSON of a {type(content).__name__}, expected an object")
    return content


def _some(keys: list[str]) -> str:
    rest = len(keys) - _NAMED_IN_ERRORS
    return ", ".join(keys[:_NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "") if keys else "none"
