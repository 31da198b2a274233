"""Optimizer steps over lists of tensors: one call a parameter group, one pass over memory.

The update rules, in float32 whatever the parameter's dtype, with t = ``step`` counted from 1:

- "adamw" (arXiv 1711.05101): ``p *= 1 - lr * weight_decay``; ``m = beta1 * m + (1 - beta1) * g``; ``v = beta2 * v + (1 - beta2) * g²``;
  ``p -= lr * (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps)``. state1 is m, state2 is v.

A parameter whose gradient is zero, whose states are zero and which has no weight decay doesn't change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q_core import hookspecs
from q_core.dispatch import bound
from q_core.specs import optim as spec
from q_core.specs.optim import OptimizerName

_optimizer_step_8bit = bound(hookspecs.optimizer_step_8bit)
_optimizer_step_32bit = bound(hookspecs.optimizer_step_32bit)


@torch.no_grad()
def optimizer_step_8bit(
    name: OptimizerName,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    code1: Tensor,
    code2: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    blocksize: int = 256,
) -> None:
    """Update parameters in place, their states held as codes in blocks (arXiv 2110.02861).

    Each block is decoded, updated in float32 and encoded with a new absmax, by the rule of :mod:`q_core.ops.quantize`. The parameter is
    updated with the float32 states, before they are encoded. A block with a non-finite gradient keeps its parameter and its states.

    Args:
        name: update rule, "adamw".
        params: float32, bfloat16 or float16, contiguous; mutated.
        grads: same shapes and dtypes as params.
        state1, state2: uint8, contiguous, numel of the parameter; mutated.
        absmax1, absmax2: float32 [ceil(numel / blocksize)]; mutated.
        code1, code2: float32 [256], sorted code books of the states.
        lr, beta1, beta2, eps, weight_decay: hyper-parameters of the rule.
        step: number of this step, from 1.
        blocksize: elements a block, a power of two in 32…4096.
    """
    if not params:
        return
    spec.check_optimizer_step_8bit(
        name, params, grads, state1, state2, absmax1, absmax2, code1, code2,
        lr, beta1, beta2, eps, weight_decay, step, blocksize,
    )  # fmt: skip
    _optimizer_step_8bit(
        name, params, grads, state1, state2, absmax1, absmax2, code1, code2,
        lr, beta1, beta2, eps, weight_decay, step, blocksize,
    )  # fmt: skip


@torch.no_grad()
def optimizer_step_32bit(
    name: OptimizerName,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update parameters in place, their states held in float32. An element with a non-finite gradient keeps its value and its states.

    Args:
        name: update rule, "adamw".
        params: float32, bfloat16 or float16, contiguous; mutated.
        grads: same shapes and dtypes as params.
        state1, state2: float32, contiguous, numel of the parameter; mutated.
        lr, beta1, beta2, eps, weight_decay: hyper-parameters of the rule.
        step: number of this step, from 1.
    """
    if not params:
        return
    spec.check_optimizer_step_32bit(name, params, grads, state1, state2, lr, beta1, beta2, eps, weight_decay, step)
    _optimizer_step_32bit(name, params, grads, state1, state2, lr, beta1, beta2, eps, weight_decay, step)
