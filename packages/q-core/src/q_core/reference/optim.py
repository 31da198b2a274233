"""Reference of the optim family."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from q_core.backend import impl
from q_core.reference.quantize import decode, in_blocks, quantize_blockwise
from q_core.reference.widen import widen


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Hyperparameters], tuple[Tensor, Tensor, Tensor]]


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, h: Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    m = h.beta1 * m + (1 - h.beta1) * g
    v = h.beta2 * v + (1 - h.beta2) * g.square()
    denominator = v.sqrt() / math.sqrt(1 - h.beta2**h.step) + h.eps
    update = h.lr / (1 - h.beta1**h.step) * m
    return p * (1 - h.lr * h.weight_decay) - torch.where(update == 0, 0.0, update / denominator), m, v


RULES: dict[str, Rule] = {"adamw": adamw}


@impl
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
    h = Hyperparameters(lr, beta1, beta2, eps, weight_decay, step)
    for p, g, s1, s2, a1, a2 in zip(params, grads, state1, state2, absmax1, absmax2, strict=True):
        wide, grad = widen(p).reshape(-1), widen(g).reshape(-1)
        m, v = decode(s1, a1, code1, blocksize), decode(s2, a2, code2, blocksize)
        # A block with a non-finite gradient stays as it is.
        finite = in_blocks(grad, blocksize).isfinite().all(1)
        keep = finite.repeat_interleave(blocksize)[: grad.numel()]
        updated, m, v = RULES[name](wide, grad, m, v, h)
        for state, absmax, code, value in ((s1, a1, code1, m), (s2, a2, code2, v)):
            codes, scales = quantize_blockwise(value, code, blocksize)
            state.copy_(torch.where(keep, codes, state.view(-1)).view(state.shape))
            absmax.copy_(torch.where(finite, scales, absmax.view(-1)).view(absmax.shape))
        p.copy_(torch.where(keep, updated, wide).view(p.shape))


@impl
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
    h = Hyperparameters(lr, beta1, beta2, eps, weight_decay, step)
    for p, g, m, v in zip(params, grads, state1, state2, strict=True):
        wide, grad = widen(p), widen(g)
        keep = grad.isfinite()
        updated = RULES[name](wide, grad, m.view(p.shape), v.view(p.shape), h)
        for tensor, old, new in zip((p, m, v), (wide, m.view(p.shape), v.view(p.shape)), updated, strict=True):
            tensor.copy_(torch.where(keep, new, old).view(tensor.shape))
