"""A linear layer with adapters beside it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.layouts import CANONICAL
from q_nn.lora.adapted import Adapted
from q_nn.lora.adapter import Adapter, decoded
from q_nn.lora.config import LoRAConfig
from q_nn.sharded import refuse_sharded

DEFAULT = "default"
"""The name of an adapter that isn't given one."""

MERGE_WHOLE = "load what torch's get_model_state_dict gives with full_state_dict=True into one, and merge there"


class LoRALinear(Adapted):
    """A frozen linear layer and small ones that train beside it: ``base(x) + B(A(dropout(x))) * scaling``, for each active adapter.

    They start as zero. With DoRA the rows of ``W + B A * scaling`` are scaled to lengths that are learned.

    A state dict has the base's weight under ``base_layer.`` and each adapter's under ``adapters.<name>.``, merged or not.

    Args:
        base: the layer, quantized or not.
        config: of a first adapter, which is active and named "default"; what it says of targets and patterns plays no part.
    """

    base_layer: nn.Linear

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        adapter = Adapter(base, config, rank=config.rank, alpha=config.alpha)
        self._init_around(base)
        base.requires_grad_(False)
        self.adapters[DEFAULT] = adapter.train(base.training)
        self.active = (DEFAULT,)

    @classmethod
    def _around(cls, base: nn.Linear) -> LoRALinear:
        """A layer without adapters as yet."""
        layer = cls.__new__(cls)
        layer._init_around(base)
        return layer

    def _init_around(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.register_module("merged_layer", None)
        self.merged_layer: nn.Linear | None
        self.register_load_state_dict_pre_hook(_refuse_while_merged)  # type: ignore[no-untyped-call]
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
        """[..., in_features] to [..., out_features], of the dtype that the base gives."""
        if self.merged_layer is not None and self.enabled:
            return self._forward_merged(input)
        base: Tensor = self.base_layer(input)
        output = base
        if self.enabled:
            for name in self.active:
                if name in self.adapters:
                    output = self.adapters[name](input, output, self.base_layer)
        return output.to(base.dtype)

    def _forward_merged(self, input: Tensor) -> Tensor:
        assert self.merged_layer is not None
        if self.training and torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.adapters.parameters()):
            raise ValueError("LoRALinear: the adapters are merged and wouldn't train; unmerge_lora(model), or model.eval(), first")
        output: Tensor = self.merged_layer(input)
        return output

    # --- merging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The base's weight with the active adapters, dense and in float32 or wider: [out_features, in_features]."""
        weight = self.base_layer.weight
        dense = decoded(weight)
        for name in self.taking_part():
            adapter = self.adapters[name]
            assert isinstance(adapter, Adapter)
            dense = adapter.applied_to(weight, dense)
        return dense

    @torch.no_grad()
    def merged(self, *, dense: bool = False) -> nn.Linear:
        """The base layer with the active adapters added to its weight, for good.

        Args:
            dense: give a plain ``nn.Linear`` in the weight's dtype. Otherwise the weight keeps its format: it is quantized again if it
                was, in the layout that it had.

        Raises:
            ValueError: the layer is sharded.
        """
        refuse_sharded("LoRALinear.merged", self, MERGE_WHOLE)
        weight = self.base_layer.weight
        if dense and isinstance(weight, QuantizedTensor):
            return _dense_layer(self.base_layer, self.merged_weight().to(weight.dtype))
        if self.taking_part():  # else a quantized weight would be rounded anew for nothing
            weight.copy_(self.merged_weight().to(weight.dtype))
        return self.base_layer

    @torch.no_grad()
    def merge(self, *, dense: bool = False) -> None:
        """Let a layer with the active adapters added do the work until :meth:`unmerge`; the base isn't touched.

        Without active adapters there is nothing to do.

        Args:
            dense: as :meth:`merged` takes it.

        Raises:
            ValueError: the layer is sharded, or the base's forward was replaced, as by accelerate's hooks.
        """
        refuse_sharded("LoRALinear.merge", self, MERGE_WHOLE)
        if not self.taking_part():
            return
        self.check_may_merge()
        base, weight = self.base_layer, self.base_layer.weight
        merged = self.merged_weight().to(weight.dtype)
        if isinstance(weight, QuantizedTensor) and dense:
            layer = _dense_layer(base, merged)
        elif isinstance(weight, QuantizedTensor):
            quantized = QuantizedTensor.quantize(merged, weight.format)
            layer = _twin(base, quantized if weight.component_layout == CANONICAL else quantized.prepack(weight.component_layout))
        else:
            layer = _twin(base, merged)
        self.merged_layer = _unsaved(layer).train(self.training)

    def check_may_merge(self) -> None:
        """Refuse a base that computes with its own weight whatever class it is of."""
        if "forward" in self.base_layer.__dict__:
            raise ValueError(
                "LoRALinear.merge: the base's forward was replaced, as accelerate's hooks do, and would go on without the adapters; "
                "remove the hooks first, or merge for good"
            )

    def unmerge(self) -> None:
        """Undo :meth:`merge`."""
        self.merged_layer = None


def _dense_layer(like: nn.Linear, weight: Tensor) -> nn.Linear:
    layer = nn.Linear(like.in_features, like.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", like.bias)
    return layer.train(like.training)


def _twin(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """A layer of the same class and settings with another weight."""
    twin = layer.__class__.__new__(layer.__class__)
    twin.__dict__ = layer.__dict__.copy()
    twin._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    twin._buffers, twin._non_persistent_buffers_set = layer._buffers.copy(), layer._non_persistent_buffers_set.copy()
    # It is no part of state dicts, and these hooks belong to the other layer.
    twin._state_dict_hooks, twin._load_state_dict_pre_hooks = OrderedDict(), OrderedDict()
    return twin


def _unsaved(layer: nn.Linear) -> nn.Linear:
    """The layer with what it holds moved and counted as its own, and in no state dict: that keeps to the base and the adapters."""
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None:
            del layer._parameters[name]
            layer.register_buffer(name, parameter.detach(), persistent=False)
    return layer


def _refuse_while_merged(
    module: LoRALinear,
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_messages: list[str],
) -> None:
    if module.merged_layer is not None:
        error_messages.append(f"{prefix[:-1]}: its adapters are merged, and what is loaded isn't; call unmerge_lora(model) first")
