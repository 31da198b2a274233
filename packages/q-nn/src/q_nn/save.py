"""Save a model as a Hugging Face directory."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from q_core.formats.checkpoint import flat_keys
from q_core.formats.sharding import is_dtensor
from q_nn.atomic import replacing
from q_nn.hf_config import quantization_config
from q_nn.lora import LoRALinear
from q_nn.shards import CONFIG, GENERATION_CONFIG, MAX_SHARD_SIZE, ShardWriter, is_model_file, size_in_bytes, write_json
from q_nn.state_hooks import prepare


def save_pretrained(model: nn.Module, directory: str | PathLike[str], *, max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Write the weights, config.json and, if the model has one, generation_config.json.

    Quantized weights are written in bitsandbytes' layout and config.json describes them in transformers' dialect, so that
    ``AutoModelForCausalLM.from_pretrained`` reads the directory. Weights that are tied are written once. The weights are one file,
    model.safetensors, or several and model.safetensors.index.json.

    A model that is there already is replaced as a whole: at whatever moment the process is killed, the directory holds the old model or
    the new one, see :mod:`q_nn.atomic`. Other files, such as a tokenizer's, which has a ``save_pretrained`` of its own, stay.

    Args:
        model: has a transformers ``config``.
        directory: made if it isn't there.
        max_shard_size: bytes of weights a file, or a size such as "5GB"; more only if the tensors of one module take more.

    Raises:
        TypeError: the model has no such config.
        ValueError: the model holds adapters, is on the meta device, is sharded, or is quantized in more ways than config.json can
            say.
        OSError: writing failed.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        raise TypeError(f"save_pretrained: {type(model).__name__} has no transformers config, expected model.config to be one")
    if adapters := [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]:
        raise ValueError(f"save_pretrained: {adapters[0]} and {len(adapters) - 1} more hold adapters; merge_lora(model) first")
    max_bytes = size_in_bytes(max_shard_size)
    groups = tensors_by_module(model)
    for group in groups.values():
        for name, tensor in group.items():
            _check(name, tensor)
    description = describe(model, config)
    generation = getattr(model, "generation_config", None)

    with replacing(Path(directory), is_model_file, entry=CONFIG) as stage:
        writer = ShardWriter(stage, max_bytes)
        for group in groups.values():
            writer.add(group)
        writer.finish()
        write_json(stage / CONFIG, description)
        if generation is not None:
            write_json(stage / GENERATION_CONFIG, json.loads(generation.to_json_string()))


def _check(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"save_pretrained: {name} is on the meta device, expected real values; load the model first")
    if is_dtensor(tensor):
        raise ValueError(
            f"save_pretrained: {name} is sharded, expected a whole model; load what torch's "
            "get_model_state_dict gives with full_state_dict=True into one, and save that"
        )


def tensors_by_module(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The state dict in plain tensors, each parameter once, those of each module together and in the order of the modules."""
    state: dict[str, Tensor] = prepare(model).state_dict()
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first_names.setdefault(id(parameter), name) != name:
            for key in flat_keys(name, state) or (name,):
                state.pop(key, None)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name, _ in model.named_modules(remove_duplicate=False)}
    for key, tensor in state.items():
        owner = key.rpartition(".")[0]
        while owner not in groups:  # the flat layout adds to a parameter's name
            owner = owner.rpartition(".")[0]
        groups[owner][key] = tensor
    return {name: group for name, group in groups.items() if group}


def describe(model: nn.Module, config: Any) -> dict[str, Any]:
    """What config.json says of a model, quantized or not, on any device."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    description: dict[str, Any] = json.loads(config.to_json_string())
    description["architectures"] = [type(model).__name__]
    description["dtype"] = str(dtype).removeprefix("torch.")
    description.pop("quantization_config", None)
    quantized = quantization_config(model, dtype)
    if quantized is not None:
        description["quantization_config"] = quantized
    return description
