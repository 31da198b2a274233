"""LAMB (arXiv 1904.00962)."""

from __future__ import annotations

from typing import Any, Unpack

from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.adam import adam_settings, check_adam
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.update import SurfaceUpdate


class LAMB(BlockwiseOptimizer):
    """LAMB with its two moments in 32 bits, or with ``optim_bits=8`` in 8; the trust ratio is whole in both.

    A sharded parameter is gathered for its step.

    Args:
        params: parameters, groups of them, or named ones, as torch optimizers take them: float32, bfloat16 or float16. A group may have
            its own value of each argument below.
        lr: learning rate.
        bias_correction: ``True``.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: times the parameter, is added to the update before its norm is taken.
        amsgrad: ``False``.
        adam_w_mode: ``True``.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        **storage: Unpack[StorageArguments],
    ) -> None:
        settings = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "adam_w_mode": adam_w_mode,
        }
        super().__init__(params, settings, storage)

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        check_adam(what, group)
        checks.supported(what, "bias_correction", group["bias_correction"], (True,), "moments are always corrected")
        checks.supported(what, "adam_w_mode", group["adam_w_mode"], (True,), "decay is part of the update, not of the gradient")

    def update(self, group: dict[str, Any], step: int) -> SurfaceUpdate:
        return SurfaceUpdate("lamb", adam_settings(group, step))


class LAMB8bit(LAMB):
    """:class:`LAMB` with its moments in 8 bits."""

    default_bits = 8


class LAMB32bit(LAMB):
    """:class:`LAMB` with its moments in 32 bits."""

    default_bits = 32


class PagedLAMB(LAMB):
    """:class:`LAMB` with paged states."""

    default_paged = True


class PagedLAMB8bit(LAMB8bit):
    """:class:`LAMB` with paged states in 8 bits."""

    default_paged = True


class PagedLAMB32bit(LAMB32bit):
    """:class:`LAMB` with paged states in 32 bits."""

    default_paged = True
