"""Parameters that several modules share, such as the embeddings and the output layer of many models."""

from __future__ import annotations

from collections import defaultdict

from torch import nn


def tie_groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter that is tied, the names of all that it is tied to, itself among them, one a module that holds it.

    A module that goes by several names itself is one owner. What transformers declares to be tied counts on the meta device, where it
    needn't be one object yet.
    """
    parameters = {
        f"{prefix}.{own}".lstrip("."): parameter
        for prefix, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None
    }
    declared = getattr(model, "all_tied_weights_keys", {})
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in parameters.items():
        source = parameters.get(declared.get(name, name), parameter)
        groups[id(source if source.is_meta and parameter.is_meta else parameter)].append(name)
    return {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}


def tied_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are tied, and of those that a transformers model declares so."""
    tied = set(tie_groups(model))
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        tied.update(pair)
    return tied
