"""Modules that train as a whole beside the adapters, such as a new output layer."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from q_nn.lora.adapted import Adapted


class TrainedModule(Adapted):
    """A module and copies of it that train, one an adapter; ``LoRAConfig.modules_to_save`` makes them.

    The active adapter's copy does the module's work; what code looks for on the module, such as its weight, is that copy's too.
    """

    def in_use(self) -> nn.Module:
        """The module that does the work: the active adapter's copy, or the one that the model came with."""
        names = self.taking_part() if self.enabled else []
        module = self.adapters[names[0]] if names else self.base_layer
        assert isinstance(module, nn.Module)
        return module

    def copied(self) -> nn.Module:
        """Another copy to train, of the module as it came."""
        result = copy.deepcopy(self.base_layer).requires_grad_(True)
        return result.train(self.training)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the module in use gives."""
        return self.in_use()(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            half_built = "_modules" not in self.__dict__ or name in ("base_layer", "adapters")  # as by copy and pickle
            if half_built or name.startswith("__"):
                raise
            return getattr(self.in_use(), name)
