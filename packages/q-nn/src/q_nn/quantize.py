"""Quantize a model in place, and say what was done."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from q_core.formats.four_bit import FourBit
from q_core.formats.fp8_rows import Fp8Rows
from q_core.formats.quantized_tensor import all_finite
from q_nn.config import QConfig
from q_nn.convert import LINEAR, quantize_weights, rebuild
from q_nn.lora.adapted import refuse_adapted
from q_nn.memory import tensor_bytes, weight_bytes
from q_nn.plan import PlannedLayer, QuantizePlan, plan_quantization
from q_nn.report import QuantizedLayer, QuantizeReport
from q_nn.sharded import refuse_sharded


def quantize(model: nn.Module, config: QConfig, *, progress: bool = False) -> QuantizeReport:
    """Quantize the layers of a model in place, one after the other.

    Linear layers (``nn.Linear``), the fused experts of transformers 5 and, where a rule says so, embeddings (``nn.Embedding``) make place
    for quantized ones, under the same names and with the same biases. What can't be quantized is left alone and reported: subclasses, which
    may compute something else, a weight that other modules share (tied embeddings) unless a rule means these likewise, and what
    ``config.skip`` names.

    Weights are checked one by one before anything is changed. Then each dense weight is let go of before the next is quantized: what it
    takes beyond the model as it was is one layer's quantized weight. If it is interrupted, every layer is either as it was or quantized,
    and a second call does the rest.

    Args:
        model: on any device but "meta".
        config: formats, rules and what to skip.
        progress: show a progress bar.

    Returns:
        What was quantized, what not and why, and the bytes before and after.

    Raises:
        ValueError: a weight has elements that are not finite, or is on the meta device, or nothing is there to quantize, or
            a rule or a pattern of ``config.skip`` means nothing, or the model is sharded or has adapters; the message names it, and
            nothing is changed.
    """
    if not isinstance(config, QConfig):
        raise TypeError(f"quantize: config is {type(config).__name__}, expected a QConfig")
    refuse_sharded("quantize", model, "quantize before fully_shard")
    refuse_adapted("quantize", model)
    plan = plan_quantization(model, config)
    for layer in plan.layers:
        _check_weights(model, layer)
    return apply_plan(model, plan, progress=progress)


def apply_plan(model: nn.Module, plan: QuantizePlan, *, progress: bool = False) -> QuantizeReport:
    """Quantize what was planned, of values that were checked. A model on the meta device becomes the quantized one there."""
    before = weight_bytes(model)
    places = _places(model)
    done = [
        _quantize_layer(model, layer, places) for layer in tqdm(plan.layers, desc="quantize", unit="layer", disable=not progress)
    ]
    return QuantizeReport(tuple(done), plan.kept, before, weight_bytes(model))


def _quantize_layer(model: nn.Module, layer: PlannedLayer, places: dict[str, list[str]]) -> QuantizedLayer:
    """Quantize one layer's weights, and put modules around them in the place of all that share them."""
    first, *tied = layer.names
    old = model.get_submodule(first)
    before = sum(tensor_bytes(old.get_parameter(own)) for own in layer.kind.weights)
    weights = quantize_weights(first, old, layer.rules[0])
    new = rebuild(old, weights, layer.rules[0])
    _put(model, places[first], new)
    for name, rule in zip(tied, layer.rules[1:], strict=True):
        other = rebuild(model.get_submodule(name), weights, rule)
        other._parameters.update({own: new._parameters[own] for own in weights})  # one parameter, not two of the same tensor
        _put(model, places[name], other)
    shapes = tuple(tuple(weight.shape) for weight in weights.values())
    after = sum(weight.stored_bytes for weight in weights.values())
    return QuantizedLayer(first, layer.kind.name, _in_words(layer), shapes, before, after, tuple(tied))


def _places(model: nn.Module) -> dict[str, list[str]]:
    """All names of each module, by the one that ``named_modules`` gives it."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(first.setdefault(id(module), name), []).append(name)
    return names


def _put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)


def _in_words(layer: PlannedLayer) -> str:
    rule = layer.rules[0]
    format = rule.weight_format()
    if isinstance(format, FourBit):
        nested = ", double-quantized scales" if format.nested_blocksize is not None else ""
        return f"{format.quant_type}, blocks of {format.blocksize}{nested}"
    if isinstance(format, Fp8Rows):
        return "fp8"
    rounds = rule.format == "int8" and layer.kind is LINEAR
    return f"int8, threshold {rule.outlier_threshold():g}" if rounds else "int8, weight only"


def _check_weights(model: nn.Module, layer: PlannedLayer) -> None:
    module = model.get_submodule(layer.names[0])
    for own in layer.kind.weights:
        weight = module.get_parameter(own)
        name = f"{layer.names[0]}.{own}"
        if weight.is_meta:
            raise ValueError(f"quantize: {name} is on the meta device, expected real values; load the model first")
        if not all_finite(weight):
            count = int((~torch.isfinite(weight)).sum())
            raise ValueError(f"quantize: {name} has {count} elements that are NaN or infinite, expected finite ones")
