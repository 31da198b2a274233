"""What kinds of modules can be quantized, and the module that takes one's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WEIGHT_DTYPES
from q_nn import experts
from q_nn.embedding import embedding_refusal
from q_nn.layers import around, embedding_around
from q_nn.linear8bit import Linear8bitLt
from q_nn.linear_int8 import LinearInt8
from q_nn.rules import QRule

Weights = Mapping[str, QuantizedTensor]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of module that can be quantized.

    Attributes:
        name: what to call it.
        weights: names of the parameters that are quantized.
        by_default: whether it is quantized where no rule means it.
        refuse: why a module of the kind can't be quantized by a rule; ``None`` if it can.
        rebuild: the module with these weights and the rest of the old one.
    """

    name: str
    weights: tuple[str, ...]
    by_default: bool
    refuse: Callable[[Any, QRule], str | None]
    rebuild: Callable[[Any, Weights, QRule], nn.Module]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module; ``None`` if it is of none. A subclass may compute something else, and so is of none."""
    if type(module) is nn.Linear:
        return LINEAR
    if type(module) is nn.Embedding:
        return EMBEDDING
    if any(parameter is not None and parameter.ndim == 3 for parameter in map(module._parameters.get, experts.WEIGHTS)):
        return EXPERTS
    return None


def refusal(module: nn.Module, rule: QRule) -> str | None:
    """Why a module can't be quantized by a rule; ``None`` if it can."""
    if any(isinstance(parameter, QuantizedTensor) for parameter in module._parameters.values()):
        return "quantized already"
    kind = kind_of(module)
    if kind is None and isinstance(module, (nn.Linear, nn.Embedding)):
        return f"{type(module).__name__} is a subclass, which may compute something else"
    if kind is None:
        return f"{type(module).__name__} is no linear layer, embedding or fused experts"
    if (reason := kind.refuse(module, rule)) is not None:
        return reason
    for name in kind.weights:
        weight = module._parameters.get(name)
        if weight is None:
            return f"its {name} is computed, not a parameter"
        if weight.dtype not in WEIGHT_DTYPES:
            return f"its dtype is {weight.dtype}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which another layer would lose"
    if "forward" in module.__dict__:
        return "its forward was replaced, which another layer would lose"
    return None


def quantize_module(name: str, module: nn.Module, rule: QRule) -> nn.Module:
    """The quantized module that takes the place of another, which stays as it is.

    Args:
        name: for messages.
        module: ``nn.Linear``, ``nn.Embedding``, or fused experts (:class:`q_nn.QuantizedExperts`). Of one on the meta device the result
            is there too, ready to be loaded.
        rule: its format, not ``None``, and the format's settings; what the rule means doesn't matter here.

    Raises:
        ValueError: the module can't be quantized so, or a weight has elements that are NaN or infinite; the message names it.
    """
    if (reason := refusal(module, rule)) is not None:
        raise ValueError(f"quantize: {name or 'the module'} can't be quantized: {reason}")
    return rebuild(module, quantize_weights(name, module, rule), rule)


def quantize_weights(name: str, module: nn.Module, rule: QRule) -> dict[str, QuantizedTensor]:
    """The quantized weights of a module that :func:`refusal` has nothing against."""
    kind, format = kind_of(module), rule.weight_format()
    assert kind is not None
    if format is None:
        raise ValueError(f"quantize: the rule for {name or 'the module'} has no format, expected one")
    weights = {}
    for own in kind.weights:
        try:
            weights[own] = QuantizedTensor.quantize(module.get_parameter(own), format)
        except ValueError as error:
            raise ValueError(f"quantize: {name}.{own}: {error}") from error
    return weights


def rebuild(module: nn.Module, weights: Weights, rule: QRule) -> nn.Module:
    """A module like ``module`` with these weights."""
    kind = kind_of(module)
    assert kind is not None
    return kind.rebuild(module, weights, rule)


def _refuse_fp8(module: nn.Module, rule: QRule) -> str | None:
    return "fp8 is for experts only" if isinstance(rule.weight_format(), Fp8Rows) else None


def _rebuild_linear(linear: nn.Linear, weights: Weights, rule: QRule) -> nn.Module:
    if rule.format == "int8_weight_only":
        return LinearInt8._around(linear, weights["weight"])
    layer = around(linear, weights["weight"])
    if isinstance(layer, Linear8bitLt):
        layer.threshold = rule.outlier_threshold()
    return layer


def _refuse_embedding(embedding: nn.Embedding, rule: QRule) -> str | None:
    return _refuse_fp8(embedding, rule) or embedding_refusal(embedding)


def _rebuild_embedding(embedding: nn.Embedding, weights: Weights, rule: QRule) -> nn.Module:
    return embedding_around(embedding, weights["weight"])


def _refuse_experts(module: nn.Module, rule: QRule) -> str | None:
    return experts.why_not(module)


def _rebuild_experts(module: nn.Module, weights: Weights, rule: QRule) -> nn.Module:
    return experts.QuantizedExperts(weights["gate_up_proj"], weights["down_proj"]).train(module.training)


LINEAR = Kind("linear layer", ("weight",), True, _refuse_fp8, _rebuild_linear)
EMBEDDING = Kind("embedding", ("weight",), False, _refuse_embedding, _rebuild_embedding)
EXPERTS = Kind("fused experts", experts.WEIGHTS, True, _refuse_experts, _rebuild_experts)
