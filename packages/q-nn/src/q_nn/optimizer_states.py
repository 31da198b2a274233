"""How much memory an optimizer's states take, by the layouts of q-optim's optimizers and without one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from q_core.optimizers import RULES

_BLOCKSIZES = {8: 256, 4: 128}
_QUANTIZED_FROM = 4096
"""Elements of a parameter; the states of smaller ones are in 32 bits."""
_FOUR_BITS = ("adamw",)
OPTIMIZERS = tuple(f"{rule}{bits}" for rule in RULES for bits in ("", "8bit", *(("4bit",) if rule in _FOUR_BITS else ())))
"""By name, such as "adamw" with states in 32 bits and "adamw8bit"."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An update rule and how many bits an element of its states has."""

    rule: str
    bits: int

    @classmethod
    def named(cls, name: str) -> Optimizer:
        """The optimizer of a name in :data:`OPTIMIZERS`.

        Raises:
            ValueError: there is none.
        """
        if name not in OPTIMIZERS:
            raise ValueError(f"optimizer is {name!r}, expected one of {OPTIMIZERS}")
        bits = next((bits for bits in _BLOCKSIZES if name.endswith(f"{bits}bit")), 32)
        return cls(name.removesuffix(f"{bits}bit"), bits)

    def __str__(self) -> str:
        return f"{self.rule}, states in {self.bits} bits"

    def others(self) -> tuple[Optimizer, ...]:
        """The same rule with every precision that it has."""
        return tuple(other for name in OPTIMIZERS if (other := Optimizer.named(name)).rule == self.rule)

    def state_bytes(self, parameters: Iterable[Tensor]) -> int:
        """Bytes of all states of these parameters. Rules that have states with a momentum only are taken with one."""
        rule = RULES[self.rule]
        states = len(rule.names(0.0 if rule.states else 0.9))
        return states * sum(self._one_state(parameter.numel()) for parameter in parameters)

    def _one_state(self, elements: int) -> int:
        if self.bits == 32 or elements < _QUANTIZED_FROM:
            return 4 * elements
        codes = -(-elements * self.bits // 8)
        return codes + 4 * -(-elements // _BLOCKSIZES[self.bits])
