"""Reference of the optim family: each rule once, for states of both precisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from q_core import optimizers
from q_core.backend import impl
from q_core.optimizers import WHOLE_TENSOR_RULES
from q_core.reference.quantize import decode, in_blocks, quantize_blockwise
from q_core.reference.widen import widen


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The settings of a rule; those it doesn't use are neutral."""

    lr: float
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    dampening: float
    nesterov: bool
    trust_coefficient: float
    step: int

    @property
    def decay(self) -> float:
        """Factor of decoupled weight decay."""
        return 1 - self.lr * self.weight_decay


@dataclass(frozen=True, slots=True)
class Moments:
    """A parameter's states, decoded; those its rule doesn't keep are absent."""

    state1: Tensor | None = None
    state2: Tensor | None = None
    state3: Tensor | None = None

    @property
    def m(self) -> Tensor:
        assert self.state1 is not None
        return self.state1

    @property
    def v(self) -> Tensor:
        assert self.state2 is not None
        return self.state2

    @property
    def slow(self) -> Tensor:
        assert self.state3 is not None
        return self.state3


Rule = Callable[[Tensor, Tensor, Moments, Hyperparameters], tuple[Tensor, Moments]]


def _average(state: Tensor, value: Tensor, beta: float) -> Tensor:
    return beta * state + (1 - beta) * value


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Zero over anything is zero, also where eps is 0: what gets no gradient doesn't move."""
    return torch.where(numerator == 0, 0.0, numerator / denominator)


def _adam_moments(g: Tensor, states: Moments, h: Hyperparameters) -> Moments:
    return replace(states, state1=_average(states.m, g, h.beta1), state2=_average(states.v, g.square(), h.beta2))


def _adam_denominator(states: Moments, h: Hyperparameters) -> Tensor:
    return states.v.sqrt() / math.sqrt(1 - h.beta2**h.step) + h.eps


def _adam_update(states: Moments, h: Hyperparameters) -> Tensor:
    return _quotient(states.m / (1 - h.beta1**h.step), _adam_denominator(states, h))


def adamw(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    states = _adam_moments(g, states, h)
    return p * h.decay - h.lr * _adam_update(states, h), states


def adam(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    return adamw(p, g + h.weight_decay * p, states, replace(h, weight_decay=0.0))


def ademamix(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    states = replace(_adam_moments(g, states, h), state3=_average(states.slow, g, h.beta3))
    mixed = states.m / (1 - h.beta1**h.step) + h.alpha * states.slow
    return p * h.decay - h.lr * _quotient(mixed, _adam_denominator(states, h)), states


def lamb(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    states = _adam_moments(g, states, h)
    update = _adam_update(states, h) + h.weight_decay * p
    return p - h.lr * _ratio(p.norm(), update.norm()) * update, states


def lion(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    direction = _average(states.m, g, h.beta1).sign()
    return p * h.decay - h.lr * direction, replace(states, state1=_average(states.m, g, h.beta2))


def sgd(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    return _heavy_ball(p, g + h.weight_decay * p, states, h)


def lars(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    p_norm, g_norm = p.norm(), g.norm()
    ratio = _ratio(h.trust_coefficient * p_norm, g_norm + h.weight_decay * p_norm + h.eps)
    ratio = torch.where(g_norm > 0, ratio, 1.0)
    return _heavy_ball(p, (g + h.weight_decay * p) * ratio, states, h)


def rmsprop(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    g = g + h.weight_decay * p
    states = replace(states, state2=_average(states.v, g.square(), h.beta2))
    update = _quotient(g, states.v.sqrt() + h.eps)
    if h.beta1:
        states = replace(states, state1=h.beta1 * states.m + update)
        update = states.m
    return p - h.lr * update, states


def adagrad(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    g = g + h.weight_decay * p
    states = replace(states, state2=states.v + g.square())
    return p - h.lr * _quotient(g, states.v.sqrt() + h.eps), states


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A trust ratio, 1 where a norm is zero."""
    return torch.where((numerator > 0) & (denominator > 0), numerator / denominator, 1.0)


def _heavy_ball(p: Tensor, g: Tensor, states: Moments, h: Hyperparameters) -> tuple[Tensor, Moments]:
    if not h.beta1:
        return p - h.lr * g, states
    m = g if h.step == 1 else h.beta1 * states.m + (1 - h.dampening) * g
    return p - h.lr * (g + h.beta1 * m if h.nesterov else m), replace(states, state1=m)


RULES: dict[str, Rule] = {
    "adam": adam,
    "adamw": adamw,
    "ademamix": ademamix,
    "lion": lion,
    "sgd": sgd,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "lamb": lamb,
    "lars": lars,
}
assert RULES.keys() == optimizers.RULES.keys()


@impl
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
    h = Hyperparameters(lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step)
    held = {
        "state1": (state1, absmax1, code1),
        "state2": (state2, absmax2, code2),
        "state3": (state3, absmax3, code1),
    }
    kept = {state: held[state] for state in optimizers.RULES[name].names(beta1)}
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        wide, grad = widen(p).reshape(-1), widen(g).reshape(-1)
        # A block with a non-finite gradient stays as it is; so does the whole tensor, where a norm would spread it.
        finite = in_blocks(grad, blocksize).isfinite().all(1)
        if name in WHOLE_TENSOR_RULES:
            finite = finite.all().expand_as(finite)
        keep = finite.repeat_interleave(blocksize)[: grad.numel()]
        if skipped:
            skipped[i].add_((~keep).sum())
        states = Moments(**{state: decode(codes[i], absmax[i], code, blocksize) for state, (codes, absmax, code) in kept.items()})
        updated, states = RULES[name](wide, grad, states, h)
        for state, (codes, absmax, code) in kept.items():
            new_codes, scales = quantize_blockwise(getattr(states, state), code, blocksize)
            codes[i].copy_(torch.where(keep, new_codes, codes[i].view(-1)).view(codes[i].shape))
            absmax[i].copy_(torch.where(finite, scales, absmax[i].view(-1)).view(absmax[i].shape))
        p.copy_(torch.where(keep, updated, wide).view(p.shape))


@impl
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
    h = Hyperparameters(lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step)
    held = {"state1": state1, "state2": state2, "state3": state3}
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        wide, grad = widen(p), widen(g)
        keep = grad.isfinite()
        if name in WHOLE_TENSOR_RULES:
            keep = keep.all().expand_as(keep)
        if skipped:
            skipped[i].add_((~keep).sum())
        old = {state: held[state][i].view(p.shape) for state in optimizers.RULES[name].names(beta1)}
        updated, states = RULES[name](wide, grad, Moments(**old), h)
        for state, before in old.items():
            held[state][i].copy_(torch.where(keep, getattr(states, state), before).view(held[state][i].shape))
        p.copy_(torch.where(keep, updated, wide))
