"""Save a model as a Hugging Face directory."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from q_core.formats.sharding import is_dtensor
from q_nn.atomic import write_files
from q_nn.hf_config import quantization_config
from q_nn.lora import LoRALinear
from q_nn.state_hooks import prepare

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_GENERATION_CONFIG = "generation_config.json"


def save_pretrained(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Write model.safetensors, config.json and, if the model has one, generation_config.json.

    Quantized weights are written in bitsandbytes' layout and config.json describes them in transformers' dialect, so that
    ``AutoModelForCausalLM.from_pretrained`` reads the directory. Weights that are tied are written once. The tokenizer has a
    ``save_pretrained`` of its own.

    A save that fails leaves the files that were there whole. The files are put in place in the order above.

    Args:
        model: has a transformers ``config``.
        directory: made if it isn't there.

    Raises:
        TypeError: the model has no such config.
        ValueError: the model holds adapters, is on the meta device, is sharded, or is quantized in more ways than config.json can
            say, or the directory holds a model in several files.
        OSError: writing failed.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        raise TypeError(f"save_pretrained: {type(model).__name__} has no transformers config, expected model.config to be one")
    if adapters := [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]:
        raise ValueError(f"save_pretrained: {adapters[0]} and {len(adapters) - 1} more hold adapters; merge_lora(model) first")
    target = Path(directory)
    if (target / INDEX).exists():
        raise ValueError(f"save_pretrained: {target} holds a model in several files; choose another directory")
    tensors = _tensors(model)
    description = _describe(model, config)

    writers = {
        WEIGHTS: lambda path: _write_tensors(path, tensors),
        CONFIG: lambda path: _write_json(path, description),
    }
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation_description = json.loads(generation.to_json_string())
        writers[_GENERATION_CONFIG] = lambda path: _write_json(path, generation_description)
    target.mkdir(parents=True, exist_ok=True)
    write_files(target, writers)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in plain tensors, each parameter once."""
    first_names: dict[int, str] = {}
    duplicates = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first_names.setdefault(id(parameter), name) != name:
            duplicates.add(name)
    tensors = {}
    for name, tensor in prepare(model).state_dict().items():
        if name not in duplicates:
            if tensor.is_meta:
                raise ValueError(f"save_pretrained: {name} is on the meta device, expected real values; load the model first")
            if is_dtensor(tensor):
                raise ValueError(
                    f"save_pretrained: {name} is sharded, expected a whole model; load what torch's "
                    "get_model_state_dict gives with full_state_dict=True into one, and save that"
                )
            tensors[name] = tensor.contiguous()
    return tensors


def _describe(model: nn.Module, config: Any) -> dict[str, Any]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    description: dict[str, Any] = json.loads(config.to_json_string())
    description["architectures"] = [type(model).__name__]
    description["dtype"] = str(dtype).removeprefix("torch.")
    description.pop("quantization_config", None)
    quantized = quantization_config(model, dtype)
    if quantized is not None:
        description["quantization_config"] = quantized
    return description


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers asks for this note
    except SafetensorError as error:
        raise OSError(f"save_pretrained: writing {WEIGHTS} failed: {error}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
