"""Lion (arXiv 2302.06675)."""

from __future__ import annotations

from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.update import SurfaceUpdate, common_settings


class Lion(BlockwiseOptimizer):
    """Lion with its moment in 32 bits, or with ``optim_bits=8`` in 8.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate, a third to a tenth of what AdamW takes.
        betas: share of the moment in the direction, and its decay.
        weight_decay: decoupled decay, a share of ``lr``.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **storage: Unpack[StorageArguments],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, storage)

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        checks.betas(what, group["betas"], 2)

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        beta1, beta2 = group["betas"]
        return SurfaceUpdate("lion", {**common_settings(group, step), "beta1": beta1, "beta2": beta2})


class Lion8bit(Lion):
    """:class:`Lion` with its moment in 8 bits."""

    default_bits = 8


class Lion32bit(Lion):
    """:class:`Lion` with its moment in 32 bits."""

    default_bits = 32


class PagedLion(Lion):
    """:class:`Lion` with paged states."""

    default_paged = True


class PagedLion8bit(Lion8bit):
    """:class:`Lion` with paged states in 8 bits."""

    default_paged = True


class PagedLion32bit(Lion32bit):
    """:class:`Lion` with paged states in 32 bits."""

    default_paged = True
