"""Quantized linears: the only module here that knows q-nn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import q_nn
from q_nn.layers import replace_module
from q_serve.errors import ModelError
from q_serve.models.layers import Linear


def replace_linears(model: nn.Module, quantization_config: Mapping[str, Any], *, name: str) -> None:
    """Swap the linears of a model on the meta device for quantized ones, as a ``quantization_config`` says.

    Where LLM.int8() would look for outlier columns, activations aren't rounded: those columns are of all tokens of a step, and what a
    request gets must not hang on which others are beside it.

    Args:
        model: mutated.
        quantization_config: of config.json; bitsandbytes' 4-bit and 8-bit are supported.
        name: what an error calls the configuration.

    Raises:
        ModelError: another method, or an option of it that isn't supported.
    """
    method = quantization_config.get("quant_method")
    if method != "bitsandbytes":
        raise ModelError(
            f"{name}: quantization_config.quant_method is {method!r}, which q-serve does not support (only 'bitsandbytes')"
        )
    try:
        q_nn.replace_linears(model, quantization_config, linear_types=(Linear,))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name}: {error}") from error
    for layer in list(model.modules()):
        if isinstance(layer, q_nn.Linear8bitLt) and layer.threshold:
            replace_module(model, layer, q_nn.LinearInt8.from_linear(layer))


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized modules of a model, by name."""
    kinds = (q_nn.Linear4bit, q_nn.Linear8bitLt, q_nn.LinearInt8)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def load_quantized(module: nn.Module, state: Mapping[str, Tensor], *, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a quantized module from a checkpoint's tensors.

    Args:
        module: one of :func:`quantized_modules`; mutated.
        state: its tensors by their names in the module, in bitsandbytes' layout.
        name: what an error calls the module.
        dtype, device: of the bias, and of what the weight decodes to.

    Raises:
        ModelError: the tensors are no such module's; the message says which and why.
    """
    try:
        module.load_state_dict(dict(state), strict=True, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{name}: {' '.join(str(error).split())}") from error
    module.to(device=device, dtype=dtype).requires_grad_(False)
