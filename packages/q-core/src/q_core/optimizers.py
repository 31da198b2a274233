"""The optimizer rules by name: which states each keeps, and which settings it has.

The rules themselves are written out in :mod:`q_core.ops.optim` and computed in :mod:`q_core.reference.optim`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

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
