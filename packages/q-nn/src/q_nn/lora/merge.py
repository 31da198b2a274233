"""Merge adapters into the weights they stand beside: for good, or until they are needed apart again."""

from __future__ import annotations

import torch
from torch import nn

from q_nn.layers import replace_module
from q_nn.lora.adapted import Adapted, adapted_modules
from q_nn.lora.layer import MERGE_WHOLE, LoRALinear
from q_nn.lora.model import forget_unless_adapted
from q_nn.lora.saved_module import TrainedModule
from q_nn.sharded import refuse_sharded


def merge_lora(model: nn.Module, *, dense: bool = False, reversible: bool = False) -> None:
    """Add the active adapters to the weights they stand beside, and remove all adapters.

    A quantized weight is decoded, added to, and quantized again in the same format, which rounds anew: within the format's bound of the
    sum. Trained copies of modules take the places of these.

    Args:
        model: mutated. It stays frozen.
        dense: leave weights that were quantized dense, in the dtype that they decode to, which rounds nothing else away and takes the
            memory of a dense model. Their layers become plain ``nn.Linear``.
        reversible: keep base weights and adapters as they are, bit for bit, and beside them the merged weights, which do the work until
            :func:`unmerge_lora`. It costs the memory of the merged weights. Adapters to train make a forward with
            gradients raise in training mode meanwhile, and a state dict is that of the model unmerged.

    Raises:
        ValueError: the model has no adapters, or they are disabled or merged already, or none is active, or a weight would not be finite,
            or a base's forward was replaced and the merge is to be reversible, or the model is sharded; nothing is changed then.
    """
    refuse_sharded("merge_lora", model, MERGE_WHOLE)
    places = adapted_modules(model)
    _check(places)
    if reversible:
        for place in places.values():
            if isinstance(place, LoRALinear):
                place.check_may_merge()
    for place in places.values():
        if reversible:
            if isinstance(place, LoRALinear):
                place.merge(dense=dense)
        else:
            replace_module(model, place, _final(place, dense))
    if not reversible:
        forget_unless_adapted(model)


def unmerge_lora(model: nn.Module) -> None:
    """Undo ``merge_lora(model, reversible=True)``: the adapters take part by themselves again.

    Raises:
        ValueError: the model isn't merged so.
    """
    merged = [
        place for place in adapted_modules(model).values() if isinstance(place, LoRALinear) and place.merged_layer is not None
    ]
    if not merged:
        raise ValueError("unmerge_lora: nothing in the model is merged, expected what merge_lora(model, reversible=True) did")
    for place in merged:
        place.unmerge()


def _final(place: Adapted, dense: bool) -> nn.Module:
    if isinstance(place, LoRALinear):
        return place.merged(dense=dense)
    assert isinstance(place, TrainedModule)
    return place.in_use().requires_grad_(False)


def _check(places: dict[str, Adapted]) -> None:
    if not places:
        raise ValueError("merge_lora: the model has no adapters, expected what add_lora made")
    if not any(place.taking_part() for place in places.values()):
        raise ValueError("merge_lora: no adapter is active; choose with set_lora, or remove_lora what isn't needed")
    for name, place in places.items():
        if not place.enabled:
            raise ValueError("merge_lora: the adapters are disabled; call enable_lora(model) first")
        if not isinstance(place, LoRALinear):
            continue
        if place.merged_layer is not None:
            raise ValueError("merge_lora: the adapters are merged already; call unmerge_lora(model) first")
        if not place.taking_part():
            continue
        for adapter in place.taking_part():
            if not all(bool(torch.isfinite(parameter).all()) for parameter in place.adapters[adapter].parameters()):
                raise ValueError(f"merge_lora: an adapter of {name} has elements that are NaN or infinite, expected finite ones")
        if not bool(torch.isfinite(place.merged_weight().to(place.weight.dtype)).all()):
            raise ValueError(f"merge_lora: {name}.weight would have elements that are NaN or infinite with its adapters")
