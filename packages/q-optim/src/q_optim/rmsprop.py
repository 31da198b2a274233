"""RMSprop (Hinton, lecture 6e of Neural Networks for Machine Learning)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.update import SurfaceUpdate, common_settings


class RMSprop(BlockwiseOptimizer):
    """RMSprop with its states in 32 bits, or with ``optim_bits=8`` in 8. The update is that of ``torch.optim.RMSprop``.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        alpha: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: times the parameter, is added to the gradient.
        momentum: decay of the updates, which are kept then.
        centered: ``False``.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **storage: Unpack[StorageArguments],
    ) -> None:
        settings = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, settings, storage)

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        checks.number(what, "alpha", group["alpha"], below=1)
        checks.number(what, "momentum", group["momentum"], below=1)
        checks.number(what, "eps", group["eps"])
        checks.supported(what, "centered", group["centered"], (False,), "the mean of the gradients isn't kept")

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        own = {"beta1": group["momentum"], "beta2": group["alpha"], "eps": group["eps"]}
        return SurfaceUpdate("rmsprop", {**common_settings(group, step), **own})

    def settings_of_bitsandbytes(self, group: Mapping[str, Any]) -> dict[str, Any]:
        # Its second beta is a momentum that its update leaves out.
        return {
            "lr": group["lr"],
            "alpha": group["betas"][0],
            "momentum": 0.0,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }


class RMSprop8bit(RMSprop):
    """:class:`RMSprop` with its states in 8 bits."""

    default_bits = 8


class RMSprop32bit(RMSprop):
    """:class:`RMSprop` with its states in 32 bits."""

    default_bits = 32


class PagedRMSprop(RMSprop):
    """:class:`RMSprop` with paged states."""

    default_paged = True


class PagedRMSprop8bit(RMSprop8bit):
    """:class:`RMSprop` with paged states in 8 bits."""

    default_paged = True


class PagedRMSprop32bit(RMSprop32bit):
    """:class:`RMSprop` with paged states in 32 bits."""

    default_paged = True
