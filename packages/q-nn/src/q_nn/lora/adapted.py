"""Places in a model where adapters are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn


class Adapted(nn.Module):
    """A module of a model, and by name what adapters have for its place.

    Attributes:
        base_layer: the module, frozen.
        adapters: by the adapters' names.
        active: names of those that take part, of all the model's; not each has something here.
        enabled: whether any take part.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.enabled = True

    def taking_part(self) -> list[str]:
        """Names of the adapters here that are active, in order."""
        return [name for name in self.active if name in self.adapters]


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what is inside of an :class:`Adapted`, so that names are those of the bare model."""
    inside: str | None = None
    for name, module in model.named_modules():  # what is inside of a module comes right after it
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, Adapted) else None
        yield name, module


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """The places by name."""
    return {name: module for name, module in outer_modules(model) if isinstance(module, Adapted)}


def embeddings_of(model: nn.Module, end: Literal["input", "output"]) -> nn.Module | None:
    """What a transformers model says its embeddings or its output layer are, if it is one and says so."""
    getter = getattr(model, f"get_{end}_embeddings", None)
    try:
        found = None if getter is None else getter()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def refuse_adapted(operation: str, model: nn.Module) -> None:
    """Raise if a model has adapters, whose own small layers would be taken for the model's.

    Raises:
        ValueError: it has; the message names one.
    """
    if places := adapted_modules(model):
        raise ValueError(
            f"{operation}: {next(iter(places))} has adapters, expected a bare model; "
            "do it before add_lora, or merge_lora or remove_lora first"
        )
