"""Put quantized layers where a checkpoint has quantized weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.hf_config import BitsAndBytesConfig
from q_nn.layers import around, replace_module
from q_nn.linear8bit import Linear8bitLt
from q_nn.lora.adapted import refuse_adapted
from q_nn.patterns import matching
from q_nn.sharded import refuse_sharded
from q_nn.ties import tied_parameters


def replace_linears(
    model: nn.Module, quantization_config: Mapping[str, Any], *, linear_types: Sequence[type[nn.Linear]] = (nn.Linear,)
) -> tuple[str, ...]:
    """Swap the linear layers that a ``quantization_config`` means for quantized ones, empty and ready to be loaded.

    Which those are is decided as transformers does: ``llm_int8_skip_modules`` if given, else tied weights, the output layer and the last
    module are skipped; so are the modules that the model keeps in float32 (``_keep_in_fp32_modules``).

    Args:
        model: on the meta device or any other; mutated.
        quantization_config: of config.json, in transformers' dialect for bitsandbytes.
        linear_types: exact classes to swap; a subclass of ``nn.Linear`` may compute something else, so it has to be named.

    Returns:
        Names of the layers that were swapped.

    Raises:
        ValueError, TypeError: a setting is unknown or not supported, or the model is sharded or has adapters; nothing is changed then.
    """
    refuse_sharded("replace_linears", model, "replace layers before fully_shard")
    refuse_adapted("replace_linears", model)
    chosen = plan_replacements(model, BitsAndBytesConfig.from_dict(quantization_config), linear_types)
    for old, new in chosen.values():
        replace_module(model, old, new)
    return tuple(chosen)


def plan_replacements(
    model: nn.Module, config: BitsAndBytesConfig, linear_types: Sequence[type[nn.Linear]] = (nn.Linear,)
) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """The layers to swap and what for, by name; nothing is changed."""
    skip = [
        *(_default_skips(model) if config.skip is None else config.skip),
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
    ]
    tied = tied_parameters(model)
    chosen: dict[str, tuple[nn.Linear, nn.Linear]] = {}
    for name, module in model.named_modules():
        if type(module) not in linear_types or matching(name, skip) is not None or f"{name}.weight" in tied:
            continue
        assert isinstance(module, nn.Linear)
        chosen[name] = module, _empty_layer(module, config)
    return chosen


def _empty_layer(linear: nn.Linear, config: BitsAndBytesConfig) -> nn.Linear:
    weight = linear.weight
    if config.has_fp16_weights:
        return Linear8bitLt.from_linear(linear, threshold=config.threshold, has_fp16_weights=True)
    layer = around(linear, QuantizedTensor.empty(weight.shape, config.format, dtype=weight.dtype, device=weight.device))
    if isinstance(layer, Linear8bitLt):
        layer.threshold = config.threshold
    return layer


def _default_skips(model: nn.Module) -> set[str]:
    """What transformers leaves alone where the config doesn't say: tied weights, the last module, the output layer."""
    keys = tied_parameters(model) | {list(model.named_parameters())[-1][0]}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    names = {name for name, module in model.named_modules() if output is not None and module is output}
    return names | {key.removesuffix(".weight") for key in keys}
