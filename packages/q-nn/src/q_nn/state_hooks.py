"""Two hooks a module that make ``state_dict`` and ``load_state_dict`` speak bitsandbytes' flat layout.

A state dict then holds plain tensors only, and takes them back strictly. Modules of this package and :func:`q_nn.quantize` install the
hooks; a plain module that is to *load* a quantized checkpoint needs :func:`prepare` first. They survive deepcopy and pickle.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from q_core.formats.checkpoint import flat_keys, from_flat, to_flat
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat

Module = TypeVar("Module", bound=nn.Module)
_INSTALLED = "_q_state_hooks"


def prepare(model: Module) -> Module:
    """Install the hooks on every module of ``model``, so that it can load a checkpoint of quantized weights; returns ``model``."""
    for module in model.modules():
        install(module)
    return model


def install(module: nn.Module) -> None:
    """Install the hooks on one module, once."""
    if not hasattr(module, _INSTALLED):
        setattr(module, _INSTALLED, True)
        module.register_state_dict_post_hook(_flatten)
        module.register_load_state_dict_pre_hook(_unflatten)


def accepts(module: nn.Module, format: WeightFormat) -> bool:
    """Whether a module can hold a weight in that format; plain modules can hold any."""
    judge = getattr(module, "accepts_format", None)
    return judge is None or bool(judge(format))


def _flatten(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for name, parameter in module._parameters.items():
        key = prefix + name
        if isinstance(parameter, QuantizedTensor) and isinstance(state.get(key), QuantizedTensor):
            state.update(to_flat(key, state.pop(key)))


def _unflatten(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_messages: list[str],
) -> None:
    for name, target in list(module._parameters.items()):
        key = prefix + name
        if target is None or not isinstance(state.get(key), Tensor):
            continue
        keys: tuple[str, ...] = (key,)
        try:
            keys = flat_keys(key, state) or keys
            loaded = _read(module, key, target, state)
        except (TypeError, ValueError) as error:
            error_messages.append(str(error))
            loaded = target  # the weight stays as it was, and isn't reported as missing on top
        if loaded is not None:
            for flat_key in keys:
                del state[flat_key]
            state[key] = loaded
        if isinstance(loaded, QuantizedTensor) and loaded.shape == target.shape:
            module._parameters[name] = _target_for(loaded, target)


def _read(module: nn.Module, key: str, target: Tensor, state: dict[str, Any]) -> Tensor | None:
    """The quantized tensor at a key, from flat or from dense; ``None`` where torch can do the whole job."""
    if flat_keys(key, state):
        loaded = from_flat(key, state, dtype=target.dtype)
        if not accepts(module, loaded.format):
            raise ValueError(f"checkpoint: {key} is held as {loaded.format}, which {type(module).__name__} doesn't take")
        return loaded
    dense = state[key]
    if isinstance(target, QuantizedTensor) and not isinstance(dense, QuantizedTensor) and dense.shape == target.shape:
        return QuantizedTensor.quantize(dense, target.format)
    return None


def _target_for(loaded: QuantizedTensor, target: Tensor) -> nn.Parameter:
    """A frozen parameter on the old one's device that what was loaded can be copied into, or assigned in place of."""
    if isinstance(target, QuantizedTensor) and (target.format, target.dtype) == (loaded.format, loaded.dtype):
        assert isinstance(target, nn.Parameter)
        return target
    return nn.Parameter(torch.empty_like(loaded, device=target.device), requires_grad=False)
