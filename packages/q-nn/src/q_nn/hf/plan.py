"""What a transformers model on the meta device will be made of once it is quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_nn.config import QConfig
from q_nn.convert import rebuild
from q_nn.describe import quantized_weights
from q_nn.hf_config import BitsAndBytesConfig
from q_nn.plan import plan_quantization
from q_nn.replace import plan_replacements

Weights = Mapping[str, QuantizedTensor]


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """A module that another will take the place of.

    Attributes:
        formats: of its parameters that are to be quantized, by their names in it.
        build: the other, from it and those parameters, which are quantized then.
    """

    formats: Mapping[str, WeightFormat]
    build: Callable[[nn.Module, Weights], nn.Module]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which modules others will take the places of.

    Attributes:
        modules: by name.
        formats: of all the parameters that are to be quantized, by their names in the model.
    """

    modules: Mapping[str, PlannedModule]
    formats: Mapping[str, WeightFormat]


def plan(model: nn.Module, settings: QConfig | BitsAndBytesConfig) -> Plan:
    """Decide what of a model is quantized, and to what; nothing is changed.

    Raises:
        ValueError: the settings contradict the model; the message says how.
    """
    modules: dict[str, PlannedModule] = {}
    if isinstance(settings, BitsAndBytesConfig):
        for name, (_, new) in plan_replacements(model, settings).items():
            formats = {own: weight.format for own, weight in quantized_weights(new).items()}
            modules[name] = PlannedModule(formats, functools.partial(_take_over, new))
    else:
        for layer in plan_quantization(model, settings).layers:
            for name, rule in zip(layer.names, layer.rules, strict=True):
                format = rule.weight_format()
                assert format is not None
                modules[name] = PlannedModule(dict.fromkeys(layer.kind.weights, format), functools.partial(rebuild, rule=rule))
    return Plan(modules, {f"{name}.{own}": f for name, module in modules.items() for own, f in module.formats.items()})


def _take_over(new: nn.Module, old: nn.Module, weights: Weights) -> nn.Module:
    """``new``, which has the same names for its parameters, with what was loaded into ``old``."""
    new._parameters.update(old._parameters)
    return new.train(old.training)
