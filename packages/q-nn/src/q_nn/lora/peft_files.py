"""Adapters in files, in PEFT's layout: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from q_core.formats.sharding import is_dtensor
from q_core.specs.check import short
from q_nn.atomic import write_files
from q_nn.lora.adapted import adapted_modules, outer_modules
from q_nn.lora.config import LoRAConfig
from q_nn.lora.layer import DEFAULT, LoRALinear
from q_nn.lora.model import attach, build, check_may_add, lora_adapters
from q_nn.lora.peft_config import from_peft, to_peft
from q_nn.lora.saved_module import TrainedModule
from q_nn.lora.targets import Plan, plan_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
"""PEFT wraps a model twice."""
_NAMED_IN_ERRORS = 5


def save_lora(model: nn.Module, directory: str | PathLike[str], *, name: str = DEFAULT) -> None:
    """Write one adapter, and the trained copies of modules that belong to it, as PEFT does.

    ``PeftModel.from_pretrained(model, directory)`` reads it, and so does :func:`load_lora`. The base model isn't written. Each file is
    old or new, never half, also if the save fails: the weights are put in place before the config.

    Of a model that ``fully_shard`` sharded, all processes must call it; the first one writes.

    Args:
        model: has the adapter, active or not, merged reversibly or not.
        directory: made if it isn't there.
        name: of the adapter; it isn't written.

    Raises:
        ValueError: there is no such adapter, or it is on the meta device.
        OSError: writing failed.
    """
    present = lora_adapters(model)
    if name not in present:
        raise ValueError(f"save_lora: the model has no adapter {name!r}, expected of {', '.join(present) or 'none'}")
    own = {each: place for each, place in adapted_modules(model).items() if name in place.adapters}
    adapted = {each for each, place in own.items() if isinstance(place, LoRALinear)}
    others = (each for each, _ in outer_modules(model) if each not in adapted)
    settings = to_peft(present[name], model, adapted, others)
    tensors: dict[str, Tensor] = {}
    sharded = False
    for each, place in own.items():
        for key, tensor in place.adapters[name].state_dict().items():
            if tensor.is_meta:
                raise ValueError(f"save_lora: {each}.{key} is on the meta device, expected real values")
            if is_dtensor(tensor):
                sharded, tensor = True, tensor.full_tensor()
            tensors[f"{_PREFIX}{each}.{key}"] = tensor.contiguous()
    if sharded and dist.get_rank() != 0:
        return
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    write_files(
        target,
        {WEIGHTS: lambda path: _write_tensors(path, tensors), CONFIG: lambda path: _write_json(path, settings)},
    )


def load_lora(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    name: str = DEFAULT,
    trainable: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[nn.Parameter]:
    """Add an adapter that PEFT or :func:`save_lora` wrote, to a model like the one that it was made for; it becomes the active one.

    What the settings mean is checked strictly: those that would change what the adapter gives, and aren't known here, are refused.

    Args:
        model: quantized or not; mutated, and frozen. It may have other adapters.
        directory: holds adapter_model.safetensors and adapter_config.json.
        name: to give the adapter, as for :func:`q_nn.add_lora`.
        trainable: whether it is to train on.
        dtype: of the adapter, whatever it was saved in. Copies of modules are of the model's.

    Returns:
        Its parameters.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what its name says, or a setting isn't supported, or keys or shapes don't fit the model, or a value isn't
            finite, or the model can't take it, as for :func:`q_nn.add_lora`. Nothing is changed then.
    """
    check_may_add("load_lora", model, name)
    source = Path(directory)
    config = _read_config(source / CONFIG, dtype)
    plan = plan_adapter("load_lora", model, config)
    expected = dict(_expected(plan, config))
    tensors = _read_tensors(source / WEIGHTS)
    _check(source / WEIGHTS, tensors, expected)
    built = build(plan, config)
    for each, module in built.items():
        module.load_state_dict({key: tensors[f"{_PREFIX}{each}.{key}"] for key in expected[each]})
    return attach(model, plan, built, name, trainable=trainable)


Expected = tuple[tuple[int, ...], bool]
"""A tensor's shape, and whether it is of floating point."""


def _expected(plan: Plan, config: LoRAConfig) -> Iterator[tuple[str, dict[str, Expected]]]:
    """What the weights' file must hold, by module and by key in it."""
    for each, target in plan.linears.items():
        base, rank = target.base, target.rank
        if base.weight.is_meta:
            raise ValueError(f"load_lora: {each}.weight is on the meta device, expected real values; load the model first")
        keys: dict[str, Expected] = {
            "lora_A.weight": ((rank, base.in_features), True),
            "lora_B.weight": ((base.out_features, rank), True),
        }
        if config.dora:
            keys["lora_magnitude_vector"] = (base.out_features,), True
        yield each, keys
    for each, module in plan.saved.items():
        original = module.base_layer if isinstance(module, TrainedModule) else module
        yield each, {key: (tuple(tensor.shape), tensor.is_floating_point()) for key, tensor in original.state_dict().items()}


def _check(path: Path, tensors: dict[str, Tensor], expected: dict[str, dict[str, Expected]]) -> None:
    """Raise unless the file holds all that is expected, and no more."""
    wanted = {f"{_PREFIX}{each}.{key}": like for each, keys in expected.items() for key, like in keys.items()}
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(f"{path} doesn't fit the model: missing keys: {_some(missing)}; unexpected keys: {_some(unexpected)}")
    for key, (shape, floating) in wanted.items():
        tensor = tensors[key]
        if tensor.shape != shape:
            raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}, expected {list(shape)} by {CONFIG} and the model")
        if tensor.is_floating_point() != floating:
            kind = "floating point" if floating else "integers"
            raise ValueError(f"{path}: {key} has dtype {short(tensor.dtype)}, expected {kind}")
        if floating and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {key} has elements that are NaN or infinite, expected finite ones")


def _read_config(path: Path, dtype: torch.dtype) -> LoRAConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected an adapter as PEFT saves one")
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is JSON of a {type(settings).__name__}, expected an object")
    try:
        return from_peft(settings, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        hint = f"; {pickled.name} is a pickle, which may run any code: have PEFT save it as safetensors" if pickled.exists() else ""
        raise FileNotFoundError(f"{path}: no such file, expected an adapter's weights in safetensors{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"save_lora: writing {WEIGHTS} failed: {error}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # Not sorted: of the patterns for ranks and alphas the first that matches counts.
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _some(keys: list[str]) -> str:
    rest = len(keys) - _NAMED_IN_ERRORS
    return ", ".join(keys[:_NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "") if keys else "none"
