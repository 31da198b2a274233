"""Adagrad (Duchi, Hazan, Singer, JMLR 12, 2011)."""

from __future__ import annotations

from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.update import SurfaceUpdate, common_settings


class Adagrad(BlockwiseOptimizer):
    """Adagrad with its sum of squares in 32 bits, or with ``optim_bits=8`` in 8. The update is that of ``torch.optim.Adagrad``.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        lr_decay: at step t the rate is ``lr / (1 + (t - 1) lr_decay)``.
        weight_decay: times the parameter, is added to the gradient.
        initial_accumulator_value: what the sum begins with.
        eps: added to the root of the sum.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **storage: Unpack[StorageArguments],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
            },
            storage,
        )

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        checks.number(what, "lr_decay", group["lr_decay"])
        checks.number(what, "initial_accumulator_value", group["initial_accumulator_value"])
        checks.number(what, "eps", group["eps"])

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        settings = common_settings(group, step)
        decayed = settings["lr"] / (1 + (step - 1) * group["lr_decay"])
        return SurfaceUpdate("adagrad", {**settings, "lr": decayed, "eps": group["eps"]})

    def initial(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])


class Adagrad8bit(Adagrad):
    """:class:`Adagrad` with its sum of squares in 8 bits."""

    default_bits = 8


class Adagrad32bit(Adagrad):
    """:class:`Adagrad` with its sum of squares in 32 bits."""

    default_bits = 32


class PagedAdagrad(Adagrad):
    """:class:`Adagrad` with paged states."""

    default_paged = True


class PagedAdagrad8bit(Adagrad8bit):
    """:class:`Adagrad` with paged states in 8 bits."""

    default_paged = True


class PagedAdagrad32bit(Adagrad32bit):
    """:class:`Adagrad` with paged states in 32 bits."""

    default_paged = True
