"""Low-rank adapters over frozen linear layers (LoRA, arXiv 2106.09685), quantized ones too (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.layers import replace_module
from q_nn.sharded import refuse_sharded
from q_nn.ties import tied_parameters

_MERGE_WHOLE = "load what torch's get_model_state_dict gives with full_state_dict=True into one, and merge there"


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """What adapters :func:`add_lora` adds.

    Attributes:
        rank: inner size of the adapters.
        alpha: the adapters' output is scaled by ``alpha / rank``.
        dropout: probability that an input of the adapters is dropped while training.
        target: "all-linear", every linear layer but the output layer; a regular expression that must match a layer's whole name; or
            names, each meaning the layers whose name it is or ends with, from a dot on ("q_proj").
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"LoRAConfig: rank is {self.rank!r}, expected an int of 1 or more")
        if not (isinstance(self.alpha, (int, float)) and 0 < self.alpha < math.inf):
            raise ValueError(f"LoRAConfig: alpha is {self.alpha!r}, expected a positive number")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise ValueError(f"LoRAConfig: dropout is {self.dropout!r}, expected a number from 0 to below 1")
        if isinstance(self.target, str):
            try:
                re.compile(self.target)
            except re.error as error:
                raise ValueError(f"LoRAConfig: target {self.target!r} is not a regular expression ({error})") from error
        elif not (isinstance(self.target, tuple) and self.target and all(isinstance(name, str) for name in self.target)):
            raise TypeError(
                f"LoRAConfig: target is {self.target!r}, expected 'all-linear', a regular expression or a tuple of names"
            )


class LoRALinear(nn.Module):
    """A frozen linear layer and, beside it, two small ones that train: ``base(x) + B(A(dropout(x))) * alpha / rank``.

    The adapters are float32 whatever the base is, and start as zero.

    Args:
        base: the layer, quantized or not.
        config: rank, alpha and dropout; the target plays no part.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.scaling = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, config.rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(config.rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks at a linear layer's."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.base_layer.out_features

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], of the input's dtype."""
        output: Tensor = self.base_layer(input)
        update: Tensor = self.lora_B(self.lora_A(self.dropout(input.to(self.lora_A.weight.dtype))))
        return output + (update * self.scaling).to(output.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the adapters added to its weight, in the weight's own format, quantized again if it was.

        Raises:
            ValueError: the layer is sharded.
        """
        refuse_sharded("LoRALinear.merged", self, _MERGE_WHOLE)
        weight = self.base_layer.weight
        update = (self.lora_B.weight @ self.lora_A.weight) * self.scaling
        dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        weight.copy_((dense.float() + update).to(weight.dtype))
        return self.base_layer


def add_lora(model: nn.Module, config: LoRAConfig) -> list[nn.Parameter]:
    """Freeze a model and put adapters beside the linear layers that ``config.target`` means.

    Gradient checkpointing works in both kinds. The reentrant one needs an input that requires gradients, so the output of a transformers
    model's input embeddings is made to, while it trains.

    Args:
        model: mutated.
        config: what to add, and where.

    Returns:
        The parameters to train, for an optimizer.

    Raises:
        ValueError: nothing in the model is meant, or something tied is, or it has adapters already, or it is sharded; nothing is changed
            then.
    """
    refuse_sharded("add_lora", model, "add adapters before fully_shard, so that it shards them too")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("add_lora: the model has adapters already; merge_lora(model) first")
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    chosen = {name: linear for name, linear in linears.items() if _is_meant(name, linear is output, config.target)}
    if not chosen:
        raise ValueError(
            f"add_lora: target {config.target!r} means no linear layer; the model has {', '.join(list(linears)[:5]) or 'none'}"
        )
    if tied := [f"{name}.weight" for name in chosen if f"{name}.weight" in tied_parameters(model)]:
        raise ValueError(f"add_lora: {tied[0]} is tied to another module, which merging would change too; leave it out of target")
    model.requires_grad_(False)
    trainable: list[nn.Parameter] = []
    for linear in chosen.values():
        adapted = LoRALinear(linear, config)
        replace_module(model, linear, adapted)
        trainable += [*adapted.lora_A.parameters(), *adapted.lora_B.parameters()]
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Module):
        embeddings.register_forward_hook(_require_grad)
    return trainable


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights they stand beside, and remove them.

    A quantized weight is decoded, added to, and quantized again in the same format, which rounds anew: within the format's bound of the
    sum.

    Args:
        model: mutated. It stays frozen.

    Raises:
        ValueError: the model has no adapters, or an adapter isn't finite, or the model is sharded; nothing is changed then.
    """
    refuse_sharded("merge_lora", model, _MERGE_WHOLE)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not adapted:
        raise ValueError("merge_lora: the model has no adapters, expected what add_lora made")
    for name, module in adapted.items():
        for parameter in (module.lora_A.weight, module.lora_B.weight):
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"merge_lora: an adapter of {name} has elements that are NaN or infinite, expected finite ones")
    for module in adapted.values():
        replace_module(model, module, module.merged())


def _is_meant(name: str, is_output: bool, target: str | tuple[str, ...]) -> bool:
    if target == "all-linear":
        return not is_output
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in target)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if module.training and torch.is_grad_enabled():
        output.requires_grad_(True)
