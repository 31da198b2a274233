"""LARS (arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.sgd import check_momentum, momentum_of_bitsandbytes, momentum_settings
from q_optim.update import SurfaceUpdate, common_settings


class LARS(BlockwiseOptimizer):
    """LARS with its momentum in 32 bits, or with ``optim_bits=8`` in 8; the trust ratio is whole in both.

    A sharded parameter is gathered for its step.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        momentum: decay of the first moment; 0 for none, and no state.
        dampening: share of the gradient that is left out of the moment after the first step.
        weight_decay: times the parameter, is added to the gradient.
        nesterov: look a step ahead.
        trust_coefficient: size of an update relative to the parameter.
        eps: added to the norms that are divided by.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 0.02,
        eps: float = 1e-8,
        **storage: Unpack[StorageArguments],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "trust_coefficient": trust_coefficient,
                "eps": eps,
            },
            storage,
        )

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        check_momentum(what, group)
        checks.number(what, "trust_coefficient", group["trust_coefficient"])
        checks.number(what, "eps", group["eps"])

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        own = {"trust_coefficient": group["trust_coefficient"], "eps": group["eps"]}
        return SurfaceUpdate("lars", {**common_settings(group, step), **momentum_settings(group), **own})

    def settings_of_bitsandbytes(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return momentum_of_bitsandbytes(group)


class LARS8bit(LARS):
    """:class:`LARS` with its momentum in 8 bits."""

    default_bits = 8


class LARS32bit(LARS):
    """:class:`LARS` with its momentum in 32 bits."""

    default_bits = 32


class PagedLARS(LARS):
    """:class:`LARS` with paged states."""

    default_paged = True


class PagedLARS8bit(LARS8bit):
    """:class:`LARS` with paged states in 8 bits."""

    default_paged = True


class PagedLARS32bit(LARS32bit):
    """:class:`LARS` with paged states in 32 bits."""

    default_paged = True
