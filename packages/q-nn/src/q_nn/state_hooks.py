"""Two hooks a module that make ``state_dict`` and ``load_state_dict`` speak bitsandbytes' flat layout.

A state dict then holds plain tensors only, and takes them back strictly. Modules of this package and :func:`q_nn.quantize` install the
hooks; a plain module that is to *load* a quantized checkpoint needs :func:`prepare` first. They survive deepcopy and pickle.

Of a model that ``fully_shard`` sharded, the state dict holds DTensors. ``torch.distributed.checkpoint`` saves, reshards and loads it, and
so do its ``get_model_state_dict`` and ``set_model_state_dict``; only ``broadcast_from_rank0`` is refused, because there torch hands the
other ranks no more than the parameters' own keys. Double-quantized scales are sharded as plain ones, under the keys of plain ones: a model
to load such a checkpoint into from files is quantized without double quantization. (``reshard_after_forward`` is True, False, 1 or the
number of all ranks: for numbers in between torch takes parameters of one piece only, and raises at the first forward.)
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from q_core.formats.checkpoint import flat_keys, from_flat, to_flat
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.sharded_checkpoint import from_flat_sharded, quantize_sharded, to_flat_sharded
from q_core.formats.sharding import is_dtensor, local_shard
from q_core.formats.weight_format import WeightFormat
from q_core.layouts import CANONICAL

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
        _show_keys(module)


def accepts(module: nn.Module, format: WeightFormat) -> bool:
    """Whether a module can hold a weight in that format; plain modules can hold any."""
    judge = getattr(module, "accepts_format", None)
    return judge is None or bool(judge(format))


def _flatten(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    for name, parameter in module._parameters.items():
        key = prefix + name
        if parameter is None or local_shard(state.get(key)) is None:
            continue
        value = state.pop(key)
        state.update(to_flat_sharded(key, value) if is_dtensor(value) else to_flat(key, value))


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
    quantized = bool(flat_keys(key, state))
    dense = state[key]
    if is_dtensor(target) or (quantized and is_dtensor(dense)):
        return _read_sharded(key, target, state)
    if quantized:
        loaded = from_flat(key, state, dtype=target.dtype)
        if not accepts(module, loaded.format):
            raise ValueError(f"checkpoint: {key} is held as {loaded.format}, which {type(module).__name__} doesn't take")
        return loaded
    if isinstance(target, QuantizedTensor) and not isinstance(dense, QuantizedTensor) and dense.shape == target.shape:
        return QuantizedTensor.quantize(dense, target.format)
    return None


def _read_sharded(key: str, target: Tensor, state: dict[str, Any]) -> Tensor | None:
    """The same for a weight that is sharded, whose format is settled: the buffers that shards are gathered into are made for it."""
    present = local_shard(target)
    # fully_shard's own hook comes after this one. Before it a target may be as a forward left it, gathered.
    like = target if is_dtensor(target) else state[key]
    if flat_keys(key, state):
        if present is None:
            raise ValueError(
                f"checkpoint: {key} is quantized, but was sharded as a dense weight; quantize the model before fully_shard"
            )
        loaded = from_flat_sharded(key, state, like, shape=target.shape, dtype=target.dtype)
        shard = local_shard(loaded)
        assert shard is not None
        if shard.format != present.format:
            raise ValueError(
                f"checkpoint: {key} is held as {shard.format}, but was sharded as {present.format}; load it before fully_shard"
            )
        return loaded
    dense = state[key]
    if present is None or local_shard(dense) is not None or dense.shape != target.shape:
        return None
    if not dense.is_floating_point():
        raise ValueError(
            f"checkpoint: {key} is {dense.dtype} without the keys that describe it; "
            "hand the whole state dict to every rank, as broadcast_from_rank0 hands on the parameters' own keys only"
        )
    return quantize_sharded(key, dense, like, present.format)


def _target_for(loaded: QuantizedTensor, target: Tensor) -> nn.Parameter:
    """A frozen parameter, of the old one's dtype and device, that what was loaded can be copied into or assigned in place of."""
    if isinstance(target, QuantizedTensor):
        prepacked = target.component_layout != CANONICAL  # and so with its scales decoded, as copying into it does too
        if target.format == (loaded.format.resolved_format if prepacked else loaded.format):
            assert isinstance(target, nn.Parameter)
            return target
    return nn.Parameter(torch.empty_like(loaded, dtype=target.dtype, device=target.device), requires_grad=False)


class _AnyKey:
    """Has every attribute; see :func:`_show_keys`."""

    def __getattr__(self, name: str) -> _AnyKey:
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def _show_keys(module: nn.Module) -> None:
    """Let ``torch.distributed.checkpoint.state_dict`` find the keys that :func:`_flatten` makes.

    It walks every key of a state dict by attributes, and asks a module's ``_fqn_modifiers`` where to go on for a name that a hook made.
    """
    names = (*module._parameters, "SCB", "weight_format")
    module._fqn_modifiers = functools.partial(dict, dict.fromkeys(names, "_q_any_key"))  # type: ignore[assignment]
    module._q_any_key = _AnyKey()  # type: ignore[assignment]
