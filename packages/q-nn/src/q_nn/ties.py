"""Parameters that several modules share, such as the embeddings and the output layer of many models."""

from __future__ import annotations

from collections import defaultdict

from torch import nn


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter by its ``id``, one a module that holds it; more than one if it is tied.

    A module that goes by several names itself is one owner.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{name}.{own}".lstrip("."))
    return owners


def tied_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are tied, and of those that a transformers model declares so.

    The declaration matters on the meta device, where what will be tied isn't one object yet.
    """
    tied = {name for names in parameter_owners(model).values() if len(names) > 1 for name in names}
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        tied.update(pair)
    return tied
