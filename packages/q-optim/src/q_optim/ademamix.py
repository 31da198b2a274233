"""AdEMAMix (arXiv 2409.03137)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.adam import adam_settings
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.update import SurfaceUpdate


def alpha_at(alpha: float, warmup: int | None, step: int) -> float:
    """The weight of the slow moment at a step: it grows in proportion."""
    return min(step / warmup, 1.0) * alpha if warmup else alpha


def beta3_at(betas: Sequence[float], warmup: int | None, step: int) -> float:
    """The slow moment's decay at a step: its half-life grows in proportion, from that of the fast moment (2409.03137, 3.3)."""
    beta1, _, beta3 = betas
    if not warmup or step >= warmup or not beta1 or not beta3:
        return beta3
    share = step / warmup
    log1, log3 = math.log(beta1), math.log(beta3)
    return min(math.exp(log1 * log3 / ((1 - share) * log3 + share * log1)), beta3)


class AdEMAMix(BlockwiseOptimizer):
    """AdEMAMix with its three moments in 32 bits, or with ``optim_bits=8`` in 8.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        betas: decay of the fast first moment, of the second moment, and of the slow first moment.
        alpha: weight of the slow moment.
        t_alpha: steps over which ``alpha`` grows from 0; ``None``: it is there from the start.
        t_beta3: steps over which the slow moment's memory grows from that of the fast one; ``None``: it is there from the start.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, a share of ``lr``.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **storage: Unpack[StorageArguments],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "alpha": alpha,
                "t_alpha": t_alpha,
                "t_beta3": t_beta3,
                "eps": eps,
                "weight_decay": weight_decay,
            },
            storage,
        )

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        checks.betas(what, group["betas"], 3)
        checks.number(what, "alpha", group["alpha"])
        checks.number(what, "eps", group["eps"])
        for key in ("t_alpha", "t_beta3"):
            if group[key] is not None:
                checks.count(what, key, group[key])

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        own = {"beta3": beta3_at(group["betas"], group["t_beta3"], step), "alpha": alpha_at(group["alpha"], group["t_alpha"], step)}
        return SurfaceUpdate("ademamix", {**adam_settings(group, step), **own})

    def settings_of_bitsandbytes(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {key: group[key] for key in ("lr", "betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay")}


class AdEMAMix8bit(AdEMAMix):
    """:class:`AdEMAMix` with its moments in 8 bits."""

    default_bits = 8


class AdEMAMix32bit(AdEMAMix):
    """:class:`AdEMAMix` with its moments in 32 bits."""

    default_bits = 32


class PagedAdEMAMix(AdEMAMix):
    """:class:`AdEMAMix` with paged states."""

    default_paged = True


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """:class:`AdEMAMix` with paged states in 8 bits."""

    default_paged = True


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """:class:`AdEMAMix` with paged states in 32 bits."""

    default_paged = True
