"""Stochastic gradient descent, with momentum or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.update import SurfaceUpdate, common_settings


def check_momentum(what: str, group: dict[str, Any]) -> None:
    """Refuse what no algorithm with a momentum means."""
    checks.number(what, "momentum", group["momentum"], below=1)
    checks.number(what, "dampening", group["dampening"], below=1)
    checks.flag(what, "nesterov", group["nesterov"])
    if group["nesterov"] and (not group["momentum"] or group["dampening"]):
        raise ValueError(f"{what}: nesterov is True, expected False without momentum or with dampening")


def momentum_settings(group: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments of a momentum; without one there is nothing to dampen."""
    momentum = group["momentum"]
    return {"beta1": momentum, "dampening": group["dampening"] if momentum else 0.0, "nesterov": group["nesterov"]}


def momentum_of_bitsandbytes(group: Mapping[str, Any]) -> dict[str, Any]:
    """Bitsandbytes keeps them as betas; its update leaves dampening out."""
    return {"lr": group["lr"], "momentum": group["betas"][0], "dampening": 0.0, "weight_decay": group["weight_decay"]}


class SGD(BlockwiseOptimizer):
    """SGD with its momentum in 32 bits, or with ``optim_bits=8`` in 8. The update is that of ``torch.optim.SGD``.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        momentum: decay of the first moment; 0 for none, and no state.
        dampening: share of the gradient that is left out of the moment after the first step.
        weight_decay: times the parameter, is added to the gradient.
        nesterov: look a step ahead.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
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
            },
            storage,
        )

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        check_momentum(what, group)

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        return SurfaceUpdate("sgd", {**common_settings(group, step), **momentum_settings(group)})

    def settings_of_bitsandbytes(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return momentum_of_bitsandbytes(group)


class SGD8bit(SGD):
    """:class:`SGD` with its momentum in 8 bits."""

    default_bits = 8


class SGD32bit(SGD):
    """:class:`SGD` with its momentum in 32 bits."""

    default_bits = 32


class PagedSGD(SGD):
    """:class:`SGD` with paged states."""

    default_paged = True


class PagedSGD8bit(SGD8bit):
    """:class:`SGD` with paged states in 8 bits."""

    default_paged = True


class PagedSGD32bit(SGD32bit):
    """:class:`SGD` with paged states in 32 bits."""

    default_paged = True
