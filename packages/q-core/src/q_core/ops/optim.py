"""Optimizer steps over lists of tensors: one call a parameter group, one pass over memory.

The update rules, in float32 whatever the parameter's dtype, with t = ``step`` counted from 1, m = state1, v = state2, n = state3, and
"decay" the decoupled ``p *= 1 - lr * weight_decay`` before the update; of the others all but
"lamb" add ``weight_decay * p`` to g first:

- "adamw" (arXiv 1711.05101): decay; ``m = beta1 m + (1 - beta1) g``; ``v = beta2 v + (1 - beta2) g²``;
  ``p -= lr (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps)``.
- "adam" (arXiv 1412.6980): the same on g + weight_decay p, without decay.
- "ademamix" (arXiv 2409.03137): m, v and decay as adamw; ``n = beta3 n + (1 - beta3) g``;
  ``p -= lr (m / (1 - beta1^t) + alpha n) / (sqrt(v) / sqrt(1 - beta2^t) + eps)``. The caller warms alpha and beta3 up.
- "lion" (arXiv 2302.06675): decay; ``p -= lr sign(beta1 m + (1 - beta1) g)``; ``m = beta2 m + (1 - beta2) g``.
- "sgd": ``m = g`` at step 1, then ``m = beta1 m + (1 - dampening) g``; ``p -= lr m``, or ``lr (g + beta1 m)`` with nesterov. With beta1 0
  it has no state and ``p -= lr g``.
- "rmsprop": ``v = beta2 v + (1 - beta2) g²``; ``u = g / (sqrt(v) + eps)``; ``p -= lr u``, or with beta1 ``m = beta1 m + u; p -= lr m``.
- "adagrad": ``v += g²``; ``p -= lr g / (sqrt(v) + eps)``.
- "lamb" (arXiv 1904.00962): m and v as adamw; ``u = (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay p``;
  ``p -= lr (|p| / |u|) u``.
- "lars" (arXiv 1708.03888): g, with weight_decay p added, times ``trust_coefficient |p| / (|g| + weight_decay |p| + eps)``, |g| before the
  addition; then as sgd.

The norms of lamb and lars are over a whole tensor; where one is zero the ratio (for lars the factor of g) is 1. Zero over zero is zero, so
a parameter whose gradient and states are zero and which has no weight decay doesn't change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from q_core import hookspecs
from q_core.dispatch import bound
from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import OptimizerName
from q_core.specs import optim as spec

_optimizer_step_8bit = bound(hookspecs.optimizer_step_8bit)
_optimizer_step_32bit = bound(hookspecs.optimizer_step_32bit)


@torch.no_grad()
def optimizer_step_8bit(
    name: OptimizerName,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor] = (),
    state2: Sequence[Tensor] = (),
    state3: Sequence[Tensor] = (),
    absmax1: Sequence[Tensor] = (),
    absmax2: Sequence[Tensor] = (),
    absmax3: Sequence[Tensor] = (),
    skipped: Sequence[Tensor] = (),
    code1: Tensor | None = None,
    code2: Tensor | None = None,
    *,
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    trust_coefficient: float = 0.0,
    step: int,
    blocksize: int = 256,
) -> None:
    """Update parameters in place, their states held as codes in blocks (arXiv 2110.02861).

    Each block is decoded, updated in float32 and encoded with a new absmax, by the rule of :mod:`q_core.ops.quantize`. The parameter is
    updated with the float32 states, before they are encoded. A block with a non-finite gradient keeps its parameter and its states (for
    lamb and lars: the whole tensor does).

    Args:
        name: update rule.
        params: float32, bfloat16 or float16, any shape, contiguous; mutated.
        grads: same shapes and dtypes as params.
        state1, state2, state3: uint8, contiguous, numel of the parameter; mutated. Empty where the rule has no such state.
        absmax1, absmax2, absmax3: float32 [ceil(numel / blocksize)], with each state; mutated.
        skipped: int64 [], the number of elements that a non-finite gradient left as they were is added; mutated. Empty: not counted.
        code1: float32 [256], sorted code book of state1 and state3; by default the signed dynamic map.
        code2: float32 [256], sorted code book of state2; by default the unsigned dynamic map.
        lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient: settings of the rule; those that it
            doesn't use must be 0.
        step: number of this step, from 1.
        blocksize: elements a block, a power of two in 32…4096.
    """
    if not params:
        return
    if code1 is None:
        code1 = dynamic_map(signed=True, device=params[0].device)
    if code2 is None:
        code2 = dynamic_map(signed=False, device=params[0].device)
    arguments = (
        name, params, grads, state1, state2, state3, absmax1, absmax2, absmax3, skipped, code1, code2,
        lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step, blocksize,
    )  # fmt: skip
    spec.check_optimizer_step_8bit(*arguments)
    _optimizer_step_8bit(*arguments)


@torch.no_grad()
def optimizer_step_32bit(
    name: OptimizerName,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor] = (),
    state2: Sequence[Tensor] = (),
    state3: Sequence[Tensor] = (),
    skipped: Sequence[Tensor] = (),
    *,
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    trust_coefficient: float = 0.0,
    step: int,
) -> None:
    """Update parameters in place, their states held in float32.

    An element with a non-finite gradient keeps its value and its states (for lamb and lars: the whole tensor does).

    Args:
        name: update rule.
        params: float32, bfloat16 or float16, any shape, contiguous; mutated.
        grads: same shapes and dtypes as params.
        state1, state2, state3: float32, contiguous, numel of the parameter; mutated. Empty where the rule has no such state.
        skipped: int64 [], the number of elements that a non-finite gradient left as they were is added; mutated. Empty: not counted.
        lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient: settings of the rule; those that it
            doesn't use must be 0.
        step: number of this step, from 1.
    """
    if not params:
        return
    arguments = (
        name, params, grads, state1, state2, state3, skipped,
        lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step,
    )  # fmt: skip
    spec.check_optimizer_step_32bit(*arguments)
    _optimizer_step_32bit(*arguments)
