"""Which modules of a model an adapter is for, by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.lora.adapted import embeddings_of, outer_modules
from q_nn.lora.config import ALL_LINEAR, LoRAConfig
from q_nn.lora.layer import LoRALinear
from q_nn.lora.saved_module import TrainedModule
from q_nn.ties import tied_parameters

T = TypeVar("T")

_BYPASS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of linear layers in them, and don't call these."""


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer to adapt, or one that others adapt already."""

    module: nn.Linear | LoRALinear
    rank: int
    alpha: float

    @property
    def base(self) -> nn.Linear:
        """The layer without adapters."""
        return self.module.base_layer if isinstance(self.module, LoRALinear) else self.module


@dataclass(frozen=True, slots=True)
class Plan:
    """What an adapter is for, by the names that modules have without adapters."""

    linears: dict[str, Target]
    saved: dict[str, nn.Module]


def plan_adapter(operation: str, model: nn.Module, config: LoRAConfig) -> Plan:
    """Find the modules that a config means; nothing is changed.

    Raises:
        ValueError: it means no linear layer, or something that can't be adapted or trained; the message names it.
    """
    modules = dict(outer_modules(model))
    saved = _modules_to_save(operation, model, modules, config)
    inside_saved = tuple(f"{each}." for each in saved)
    output = embeddings_of(model, "output")
    linears: dict[str, Target] = {}
    for each, module in modules.items():
        if not each or not is_meant(each, module, module is output, config):
            continue
        if each in saved or each.startswith(inside_saved):
            continue
        if (reason := _why_not(each, module, modules)) is not None:
            raise ValueError(f"{operation}: target {config.target!r} means {each}, {reason}; leave it out with exclude")
        assert isinstance(module, (nn.Linear, LoRALinear))
        rank = by_pattern(each, config.rank_pattern, config.rank)
        linears[each] = Target(module, rank, by_pattern(each, config.alpha_pattern, config.alpha))
    if not linears:
        present = [each for each, module in modules.items() if each and isinstance(module, (nn.Linear, LoRALinear))]
        raise ValueError(
            f"{operation}: target {config.target!r} means no linear layer; the model has {', '.join(present[:5]) or 'none'}"
        )
    tied = tied_parameters(model)
    for each, target in linears.items():
        if not isinstance(target.module, LoRALinear) and f"{each}.weight" in tied:
            raise ValueError(
                f"{operation}: {each}.weight is tied to another module, which merging would change too; leave it out of target"
            )
    return Plan(linears, saved)


def check_patterns_used(operation: str, config: LoRAConfig, plan: Plan) -> None:
    """Refuse patterns that mean nothing, which are typing errors.

    Raises:
        ValueError: a pattern for ranks, alphas or modules to save means nothing.
    """
    for setting, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(_matches_end(pattern, name) for name in plan.linears):
                raise ValueError(f"{operation}: {setting} {pattern!r} means none of the layers that target means")
    for ending in config.modules_to_save:
        if not any(name.endswith(ending) for name in plan.saved):
            raise ValueError(f"{operation}: modules_to_save has {ending!r}, with which no module's name ends")


def in_choice(name: str, choice: str | Iterable[str]) -> bool:
    """Whether a choice of modules, see :class:`LoRAConfig`, means a name."""
    if isinstance(choice, str):
        return re.fullmatch(choice, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in choice)


def is_meant(name: str, module: nn.Module, is_output: bool, config: LoRAConfig) -> bool:
    """Whether a config's target means a module of that name."""
    if config.exclude and in_choice(name, config.exclude):
        return False
    if config.target == ALL_LINEAR:
        if isinstance(module, TrainedModule):  # else what is in it would be left out in silence
            return not is_output and any(isinstance(each, nn.Linear) for each in module.base_layer.modules())
        return isinstance(module, (nn.Linear, LoRALinear)) and not is_output
    if not in_choice(name, config.target):
        return False
    return config.layers is None or name in config.target or _layer_index(name, config.layers_pattern) in config.layers


def _layer_index(name: str, patterns: tuple[str, ...]) -> int | None:
    """The first number in a name: an expert's, if any, comes after the layer's."""
    for expression in [rf"(?:^|.*?\.)(?:{pattern})\.(?P<index>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        if (match := re.match(expression, name)) is not None:
            return int(match["index"])
    return None


def _why_not(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    if isinstance(module, TrainedModule):
        return "which another adapter trains as a whole"
    if not isinstance(module, (nn.Linear, LoRALinear)):
        return f"which is {type(module).__name__}, expected nn.Linear or a subclass"
    linear = module.base_layer if isinstance(module, LoRALinear) else module
    if "weight" not in linear._parameters:
        return "whose weight is computed, so that nothing could be merged into it"
    parent = modules.get(name.rpartition(".")[0])
    if isinstance(parent, _BYPASS):
        return f"whose weight {type(parent).__name__} reads without calling the layer"
    return None


def _modules_to_save(operation: str, model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules to train as copies.

    Raises:
        ValueError: one of them can't train, or can't be copied without changing what else the model is.
    """
    saved: dict[str, nn.Module] = {}
    tied = tied_parameters(model)
    for name, module in modules.items():
        if not name or not any(name.endswith(ending) for ending in config.modules_to_save):
            continue
        original = module.base_layer if isinstance(module, TrainedModule) else module
        if any(name.startswith(f"{outer}.") for outer in saved):
            reason = "and a module that it is in"
        elif any(isinstance(inner, LoRALinear) for inner in original.modules()):
            reason = "which other adapters are in"
        elif any(isinstance(parameter, QuantizedTensor) for parameter in original.parameters()):
            reason = "which is quantized and so doesn't train; skip it when quantizing"
        elif not isinstance(module, TrainedModule) and any(f"{name}.{own}" in tied for own, _ in original.named_parameters()):
            reason = "which is tied to another module, and a copy wouldn't be"
        else:
            saved[name] = module
            continue
        raise ValueError(f"{operation}: modules_to_save means {name}, {reason}")
    return saved


def by_pattern(name: str, patterns: Mapping[str, T], default: T) -> T:
    """The value for a name: that of the first pattern that matches its end."""
    return next((value for pattern, value in patterns.items() if _matches_end(pattern, name)), default)


def _matches_end(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
