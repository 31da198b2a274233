"""Add adapters to a model, choose those that take part, remove them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from q_nn.layers import replace_module
from q_nn.lora.adapted import Adapted, adapted_modules, embeddings_of
from q_nn.lora.adapter import Adapter
from q_nn.lora.config import LoRAConfig
from q_nn.lora.layer import DEFAULT, LoRALinear
from q_nn.lora.saved_module import TrainedModule
from q_nn.lora.targets import Plan, check_patterns_used, plan_adapter
from q_nn.sharded import refuse_sharded


def add_lora(model: nn.Module, config: LoRAConfig, *, name: str = DEFAULT) -> list[nn.Parameter]:
    """Freeze a model and put adapters beside the linear layers that ``config.target`` means; they become the active ones.

    A model may hold several adapters, each by its name; :func:`set_lora` chooses among them.

    Gradient checkpointing works in both kinds. The reentrant one needs an input that requires gradients, so the output of a transformers
    model's input embeddings is made to, while it trains.

    Args:
        model: mutated.
        config: what to add, and where.
        name: the adapter's: letters, digits, ``_`` and ``-``.

    Returns:
        The parameters to train, for an optimizer.

    Raises:
        ValueError: nothing in the model is meant, or something that can't be adapted is, or a pattern means nothing, or there is an
            adapter of that name already, or the model's adapters are merged, or it is sharded; nothing is changed then.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"add_lora: config is {type(config).__name__}, expected a LoRAConfig")
    check_may_add("add_lora", model, name)
    plan = plan_adapter("add_lora", model, config)
    check_patterns_used("add_lora", config, plan)
    return attach(model, plan, build(plan, config), name)


def check_may_add(operation: str, model: nn.Module, name: str) -> None:
    """Refuse what no adapter can be added to, or a name that no adapter can have."""
    refuse_sharded(operation, model, "add adapters before fully_shard, so that it shards them too")
    _refuse_merged(operation, model)
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z0-9_-]+", name) is None or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{operation}: name is {name!r}, expected letters, digits, _ and -, and no attribute of nn.ModuleDict")
    if name in lora_adapters(model):
        raise ValueError(
            f"{operation}: the model has an adapter {name!r} already; choose another name, or merge_lora or remove_lora"
        )


def build(plan: Plan, config: LoRAConfig) -> dict[str, nn.Module]:
    """An adapter for each layer of a plan and a copy of each module to save, by the names in the plan."""
    built: dict[str, nn.Module] = {
        each: Adapter(target.base, config, rank=target.rank, alpha=target.alpha).train(target.module.training)
        for each, target in plan.linears.items()
    }
    for each, module in plan.saved.items():
        built[each] = (module if isinstance(module, TrainedModule) else TrainedModule(module)).copied()
    return built


def attach(model: nn.Module, plan: Plan, built: dict[str, nn.Module], name: str, *, trainable: bool = True) -> list[nn.Parameter]:
    """Put what was built in its places, as the active adapter; returns its parameters."""
    model.requires_grad_(False)
    for each, module in {**{key: target.module for key, target in plan.linears.items()}, **plan.saved}.items():
        place = module
        if not isinstance(place, Adapted):
            place = LoRALinear._around(module) if isinstance(module, nn.Linear) and each in plan.linears else TrainedModule(module)
            place.train(module.training)
            replace_module(model, module, place)
        place.adapters[name] = built[each]
    set_lora(model, name, trainable=trainable)
    enable_lora(model)
    embeddings = embeddings_of(model, "input")
    if embeddings is not None and _require_grad not in embeddings._forward_hooks.values():
        embeddings.register_forward_hook(_require_grad)
    return [parameter for module in built.values() for parameter in module.parameters()]


def lora_adapters(model: nn.Module) -> dict[str, LoRAConfig]:
    """The adapters that a model holds, by name, with what they were made from."""
    found: dict[str, LoRAConfig] = {}
    for place in adapted_modules(model).values():
        for name, adapter in place.adapters.items():
            if isinstance(adapter, Adapter):
                found.setdefault(name, adapter.config)
    return found


def set_lora(model: nn.Module, names: str | Sequence[str], *, trainable: bool = True) -> None:
    """Choose the adapters that take part: the updates of several add up. Those that don't are kept, frozen.

    Args:
        model: holds them.
        names: of one or several adapters.
        trainable: whether those that take part require gradients.

    Raises:
        ValueError: the model has no adapter of a name, or adapters are merged, or two adapters can't take part at once: with DoRA, or
            as both train a copy of one module. Nothing is changed then.
    """
    chosen = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    _refuse_merged("set_lora", model)
    present = lora_adapters(model)
    if unknown := [name for name in chosen if name not in present]:
        raise ValueError(f"set_lora: the model has no adapter {unknown[0]!r}, expected of {', '.join(present) or 'none'}")
    if not chosen:
        raise ValueError("set_lora: names is empty, expected at least one; disable_lora(model) is for none")
    if len(chosen) > 1 and (dora := [name for name in chosen if present[name].dora]):
        raise ValueError(f"set_lora: {dora[0]!r} is a DoRA adapter, which scales the whole weight, expected it alone")
    places = adapted_modules(model)
    for each, place in places.items():
        if isinstance(place, TrainedModule) and len(both := [name for name in chosen if name in place.adapters]) > 1:
            raise ValueError(f"set_lora: {both[0]!r} and {both[1]!r} both train a copy of {each}, expected one of them")
    for place in places.values():
        place.active = chosen
        for name, adapter in place.adapters.items():
            adapter.requires_grad_(trainable and name in chosen)


class disable_lora:  # noqa: N801 (called like a function, as torch.no_grad is)
    """Let a model work without its adapters, from now on or, in a ``with`` statement, until its end.

    Args:
        model: holds adapters, merged or not.

    Raises:
        ValueError: the model has no adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = [(place, place.enabled) for place in _places("disable_lora", model)]
        for place, _ in self._before:
            place.enabled = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for place, enabled in self._before:
            place.enabled = enabled


def enable_lora(model: nn.Module) -> None:
    """Undo :func:`disable_lora`.

    Raises:
        ValueError: the model has no adapters.
    """
    for place in _places("enable_lora", model):
        place.enabled = True


def remove_lora(model: nn.Module, name: str = DEFAULT) -> None:
    """Remove an adapter, and with the last one every trace of adapters. The model stays frozen.

    Args:
        model: mutated. If no adapter of those left is active, none takes part until :func:`set_lora`.
        name: of the adapter.

    Raises:
        ValueError: there is no such adapter, or the adapters are merged, or the model is sharded; nothing is changed then.
    """
    refuse_sharded("remove_lora", model, "remove adapters before fully_shard")
    _refuse_merged("remove_lora", model)
    if name not in (present := lora_adapters(model)):
        raise ValueError(f"remove_lora: the model has no adapter {name!r}, expected of {', '.join(present) or 'none'}")
    for place in adapted_modules(model).values():
        place.active = tuple(each for each in place.active if each != name)
        if name in place.adapters:
            del place.adapters[name]
        if not place.adapters:
            replace_module(model, place, place.base_layer)
    forget_unless_adapted(model)


def forget_unless_adapted(model: nn.Module) -> None:
    """Remove the hook on the input embeddings if a model has no adapters any more."""
    if not adapted_modules(model):
        for module in model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if hook is _require_grad:
                    del module._forward_hooks[key]


def _places(operation: str, model: nn.Module) -> list[Adapted]:
    places = list(adapted_modules(model).values())
    if not places:
        raise ValueError(f"{operation}: the model has no adapters, expected what add_lora made")
    return places


def _refuse_merged(operation: str, model: nn.Module) -> None:
    for name, place in adapted_modules(model).items():
        if isinstance(place, LoRALinear) and place.merged_layer is not None:
            raise ValueError(f"{operation}: the adapters of {name} are merged; call unmerge_lora(model) first")


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if module.training and torch.is_grad_enabled():
        output.requires_grad_(True)
