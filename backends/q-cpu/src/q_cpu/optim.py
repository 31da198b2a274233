"""Optimizer steps. Contracts: :mod:`q_core.ops.optim`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from q_core.backend import impl
from q_cpu.runtime import native
from q_cpu.support import decline_dtype, decline_in_place


def _accepts_step(
    params: Sequence[Tensor], state1: Sequence[Tensor], state2: Sequence[Tensor], state3: Sequence[Tensor]
) -> str | None:
    for i, param in enumerate(params):
        reason = decline_dtype(f"params[{i}]", param.dtype)
        if reason is not None:
            return reason
    for argument, tensors in (("params", params), ("state1", state1), ("state2", state2), ("state3", state3)):
        for i, tensor in enumerate(tensors):
            reason = decline_in_place(f"{argument}[{i}]", tensor)
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
    state3: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    absmax3: Sequence[Tensor],
    skipped: Sequence[Tensor],
    code1: Tensor,
    code2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    trust_coefficient: float,
    step: int,
    blocksize: int,
) -> None:
    """Update parameters with optimizer states held in 8 bits."""
    native.optimizer_step_8bit(
        name, params, [grad.contiguous() for grad in grads], state1, state2, state3, absmax1, absmax2, absmax3, skipped,
        code1.contiguous(), code2.contiguous(),
        lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step, blocksize,
    )  # fmt: skip


@impl(accepts=_accepts_step)
def optimizer_step_32bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    state3: Sequence[Tensor],
    skipped: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    trust_coefficient: float,
    step: int,
) -> None:
    """Update parameters with optimizer states held in float32."""
    native.optimizer_step_32bit(
        name, params, [grad.contiguous() for grad in grads], state1, state2, state3, skipped,
        lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step,
    )  # fmt: skip
