"""The optimizer rules by name: which states each keeps, and which settings it has; and what modules want of an optimizer.

The rules themselves are written out in :mod:`q_core.ops.optim` and computed in :mod:`q_core.reference.optim`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

OptimizerName = Literal["adam", "adamw", "ademamix", "lion", "sgd", "rmsprop", "adagrad", "lamb", "lars"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a rule keeps and uses.

    Attributes:
        settings: hyper-parameters that it uses beside lr, weight_decay and step; any other must be 0.
        states: of state1 (a first moment, signed code book), state2 (a second moment, unsigned) and state3 (another first moment,
            signed), those that the rule always has.
        with_momentum: states that it has only where beta1 is not 0.
    """

    settings: tuple[str, ...]
    states: tuple[str, ...]
    with_momentum: tuple[str, ...] = ()

    def names(self, beta1: float) -> tuple[str, ...]:
        """The states of a rule with this beta1, in the order of their numbers."""
        return tuple(sorted((*self.states, *(self.with_momentum if beta1 else ()))))


_ADAM = ("beta1", "beta2", "eps")
_HEAVY_BALL = ("beta1", "dampening", "nesterov")

RULES: dict[str, Rule] = {
    "adam": Rule(_ADAM, ("state1", "state2")),
    "adamw": Rule(_ADAM, ("state1", "state2")),
    "ademamix": Rule((*_ADAM, "beta3", "alpha"), ("state1", "state2", "state3")),
    "lion": Rule(("beta1", "beta2"), ("state1",)),
    "sgd": Rule(_HEAVY_BALL, (), with_momentum=("state1",)),
    "rmsprop": Rule(_ADAM, ("state2",), with_momentum=("state1",)),
    "adagrad": Rule(("eps",), ("state2",)),
    "lamb": Rule(_ADAM, ("state1", "state2")),
    "lars": Rule((*_HEAVY_BALL, "eps", "trust_coefficient"), (), with_momentum=("state1",)),
}
assert tuple(RULES) == get_args(OptimizerName)

SETTINGS = ("beta1", "beta2", "beta3", "alpha", "eps", "dampening", "nesterov", "trust_coefficient")
ALL_STATES = ("state1", "state2", "state3")
WHOLE_TENSOR_RULES = ("lamb", "lars")
"""Rules whose trust ratio takes norms over a whole tensor."""


_PREFERENCES: WeakKeyDictionary[torch.nn.Module, dict[str, dict[str, Any]]] = WeakKeyDictionary()


def prefer(module: torch.nn.Module, parameter: str, **settings: Any) -> None:
    """Say how a module wants a parameter of its own optimized, whichever optimizer that will be: ``optim_bits=32`` for one.

    The parameter is looked up by name when an optimizer asks, so it may be replaced until then, as FSDP does. A copy of the module has no
    preferences until it states them.
    """
    _PREFERENCES.setdefault(module, {})[parameter] = settings


def preferences() -> dict[Tensor, dict[str, Any]]:
    """The settings that modules prefer, by parameter."""
    found = {}
    for module, by_name in list(_PREFERENCES.items()):
        for name, settings in by_name.items():
            parameter = getattr(module, name, None)
            if parameter is not None:
                found[parameter] = settings
    return found
