"""Adam (arXiv 1412.6980) and AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.update import SurfaceUpdate, common_settings


def check_adam(what: str, group: dict[str, Any]) -> None:
    """Refuse what no algorithm with Adam's two moments means."""
    checks.betas(what, group["betas"], 2)
    checks.number(what, "eps", group["eps"])
    checks.supported(what, "amsgrad", group["amsgrad"], (False,), "the largest second moment so far isn't kept")


def adam_settings(group: dict[str, Any], step: int) -> dict[str, Any]:
    """The op's arguments of Adam, and of what is made from it."""
    beta1, beta2, *_ = group["betas"]
    return {**common_settings(group, step), "beta1": beta1, "beta2": beta2, "eps": group["eps"]}


class Adam(BlockwiseOptimizer):
    """Adam with its two moments in 32 bits, or with ``optim_bits=8`` in 8. The update is that of ``torch.optim.Adam``.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: times the parameter, is added to the gradient.
        amsgrad: ``False``.
        decoupled_weight_decay: decay as AdamW does.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **storage: Unpack[StorageArguments],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, settings, storage)

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        check_adam(what, group)
        checks.flag(what, "decoupled_weight_decay", group["decoupled_weight_decay"])

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        return SurfaceUpdate("adamw" if group["decoupled_weight_decay"] else "adam", adam_settings(group, step))

    def settings_of_bitsandbytes(self, group: Mapping[str, Any]) -> dict[str, Any]:
        # Its Adam decays as AdamW does.
        return {**super().settings_of_bitsandbytes(group), "decoupled_weight_decay": True}


class AdamW(BlockwiseOptimizer):
    """AdamW with its two moments in 32 bits, or with ``optim_bits=8`` in 8, or in 4. The update is that of ``torch.optim.AdamW``.

    Decoupled weight decay comes first. In 8 bits the moments take 2.03 bytes a parameter instead of 8, in 4 bits 1.06. A parameter whose
    gradients are all zero and that has no weight decay never moves. A non-finite gradient leaves its block (in 32 bits: its element) as
    it was, and is counted, see :meth:`skipped`.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, a share of ``lr``.
        amsgrad: ``False``.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    supported_bits = (4, 8, 32)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **storage: Unpack[StorageArguments],
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, settings, storage)

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        check_adam(what, group)

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        return SurfaceUpdate("adamw", adam_settings(group, step))


class Adam8bit(Adam):
    """:class:`Adam` with its moments in 8 bits."""

    default_bits = 8


class Adam32bit(Adam):
    """:class:`Adam` with its moments in 32 bits."""

    default_bits = 32


class PagedAdam(Adam):
    """:class:`Adam` with paged states."""

    default_paged = True


class PagedAdam8bit(Adam8bit):
    """:class:`Adam` with paged states in 8 bits."""

    default_paged = True


class PagedAdam32bit(Adam32bit):
    """:class:`Adam` with paged states in 32 bits."""

    default_paged = True


class AdamW8bit(AdamW):
    """:class:`AdamW` with its moments in 8 bits."""

    default_bits = 8


class AdamW4bit(AdamW):
    """:class:`AdamW` with its moments in 4 bits, in blocks of 128 (arXiv 2309.01507)."""

    default_bits = 4


class AdamW32bit(AdamW):
    """:class:`AdamW` with its moments in 32 bits."""

    default_bits = 32


class PagedAdamW(AdamW):
    """:class:`AdamW` with paged states."""

    default_paged = True


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW` with paged states in 8 bits."""

    default_paged = True


class PagedAdamW32bit(AdamW32bit):
    """:class:`AdamW` with paged states in 32 bits."""

    default_paged = True
