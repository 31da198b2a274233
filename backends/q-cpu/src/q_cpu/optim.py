"""Optimizer steps. Contracts: :mod:`q_core.ops.optim`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from q_core.backend import impl
from q_cpu.runtime import native
from q_cpu.support import decline_dtype, decline_in_place

_STEP_8BIT = {"adamw": native.adamw_8bit}
_STEP_32BIT = {"adamw": native.adamw_32bit}


def _accepts_step(name: str, params: Sequence[Tensor], state1: Sequence[Tensor], state2: Sequence[Tensor]) -> str | None:
    if name not in _STEP_8BIT:
        return f"update rule {name!r}, only {', '.join(_STEP_8BIT)}"
    for i, param in enumerate(params):
        reason = (
            decline_dtype(f"params[{i}]", param.dtype)
            or decline_in_place(f"params[{i}]", param)
            or decline_in_place(f"state1[{i}]", state1[i])
            or decline_in_place(f"state2[{i}]", state2[i])
        )
        if reason is not None:
            return reason
    return None


@impl(accepts=_accepts_step)
def optimizer_step_8bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    code1: Tensor,
    code2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    blocksize: int,
) -> None:
    """Update parameters with optimizer states held in 8 bits."""
    _STEP_8BIT[name](
        params, [grad.contiguous() for grad in grads], state1, state2, absmax1, absmax2, code1.contiguous(), code2.contiguous(),
        lr, beta1, beta2, eps, weight_decay, step, blocksize,
    )  # fmt: skip


@impl(accepts=_accepts_step)
def optimizer_step_32bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update parameters with optimizer states held in float32."""
    _STEP_32BIT[name](params, [grad.contiguous() for grad in grads], state1, state2, lr, beta1, beta2, eps, weight_decay, step)
