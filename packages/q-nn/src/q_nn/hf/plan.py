"""What a transformers model on the meta device will be made of once it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.config import QConfig
from q_nn.hf_config import BitsAndBytesConfig
from q_nn.layers import around
from q_nn.quantize import _plan
from q_nn.replace import plan_replacements
from q_nn.ties import tied_parameters


@dataclass(frozen=True, slots=True)
class Plan:
    """Which modules others will take the places of.

    Attributes:
        modules: what comes, by the name of what it replaces; on the meta device, with its quantized parameters' formats.
        parameters: the quantized parameters of all of them, by their names in the model.
    """

    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, QuantizedTensor]


def plan(model: nn.Module, settings: QConfig | BitsAndBytesConfig) -> Plan:
    """Decide what of a model is quantized, and to what; nothing is changed.

    Raises:
        ValueError: the settings contradict the model; the message says how.
    """
    if isinstance(settings, BitsAndBytesConfig):
        modules: dict[str, nn.Module] = {name: new for name, (_, new) in plan_replacements(model, settings).items()}
    else:
        modules = _by_rule(model, settings)
    parameters = {
        f"{name}.{own}": parameter
        for name, module in modules.items()
        for own, parameter in module._parameters.items()
        if isinstance(parameter, QuantizedTensor)
    }
    return Plan(modules, parameters)


def _by_rule(model: nn.Module, config: QConfig) -> dict[str, nn.Module]:
    tied = tied_parameters(model)
    chosen, _ = _plan(model, config)
    format = config.weight_format()
    with torch.device("meta"):
        return {
            name: around(linear, QuantizedTensor.empty(linear.weight.shape, format, dtype=linear.weight.dtype, device="meta"))
            for name, linear in chosen.items()
            if f"{name}.weight" not in tied
        }
