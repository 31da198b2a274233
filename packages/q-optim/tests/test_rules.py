"""The updates themselves: 200 steps beside torch.optim in float64, beside the papers in float64, and each step from states in codes.

Rounding in float32 adds up, and :func:`accumulated` says to how much at most; a wrong factor, order or count is off by about ``lr``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from q_core.formats.codebooks import DYNAMIC_SIGNED, DYNAMIC_SIGNED_BOUND, DYNAMIC_UNSIGNED, DYNAMIC_UNSIGNED_BOUND
from q_optim import LAMB, LARS, SGD, Adagrad, Adam, AdamW, AdEMAMix, Lion, Muon, RMSprop
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.storage import FOUR_BIT_SIGNED, FOUR_BIT_ZERO_FREE

STEPS = 200
SHAPE = (30, 50)
EPS = torch.finfo(torch.float32).eps

State = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, State, Mapping[str, Any], int], Tensor]


def accumulated(settings: Mapping[str, Any], p: float, update: float, steps: int = STEPS) -> float:
    """How far float32 may be from float64 after some steps, with parameters up to ``p`` and updates up to ``update``.

    A step rounds the parameter, its decay and the update (1.5 eps of each size), and computes the update in no more than 12 operations
    and two norms (numel/2 eps at most each, in any order of summation). A moment with decay beta is itself a sum of rounded values, three
    roundings a step, of which a share 1 - beta is forgotten: 1.5 eps / (1 - beta). A sum without decay has one rounding a step.
    """
    betas = [
        *settings.get("betas", ()),
        settings.get("momentum", 0.0),
        settings.get("alpha", 0.0) if "betas" not in settings else 0.0,
    ]
    states = sum(1.5 / (1 - beta) for beta in betas) + (steps if "initial_accumulator_value" in settings else 0)
    norms = math.prod(SHAPE) if "trust" in settings else 0
    return steps * EPS * (1.5 * p + (12 + states + norms) * update)


def gradient(step: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(10_000))


def trajectory(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """Where 200 steps lead; the largest parameter, and the largest change a step, on the way."""
    param = nn.Parameter(start().to(dtype))
    optimizer = make([param])
    largest, update = 0.0, 0.0
    for step in range(STEPS):
        before = param.detach().clone()
        param.grad = gradient(step).to(dtype)
        optimizer.step()
        largest = max(largest, param.detach().abs().max().item())
        update = max(update, (param.detach() - before).abs().max().item())
    return param.detach(), largest, update


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (Adam, torch.optim.Adam, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}),
        (Adam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
        (Adam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
        (Adam, torch.optim.Adam, {"lr": 1e-2, "maximize": True}),
        (AdamW, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
        (AdamW, torch.optim.AdamW, {}),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
        (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (RMSprop, torch.optim.RMSprop, {"lr": 1e-2, "alpha": 0.95, "eps": 1e-6, "weight_decay": 0.1}),
        (RMSprop, torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.9}),
        (Adagrad, torch.optim.Adagrad, {"weight_decay": 0.1}),
        (Adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6}),
    ],
)
def test_torchs_own(ours: type[BlockwiseOptimizer], theirs: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
    got, _, _ = trajectory(functools.partial(ours, **settings), torch.float32)
    expected, largest, update = trajectory(functools.partial(theirs, **settings), torch.float64)
    full = ours([nn.Parameter(start())], **settings).defaults
    bound = accumulated(full, largest, update)
    assert bound < 0.3 * update, "the bound must tell one update more or less"
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1], (64, 64)])
def test_torchs_muon(shape: tuple[int, int], nesterov: bool, adjust_lr_fn: Any) -> None:
    """Bit for bit: it iterates in bfloat16, where one rounding more is seen at once."""
    settings = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    params = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    optimizers = [Muon([params[0]], **settings), torch.optim.Muon([params[1]], **settings)]
    for step in range(STEPS // 4):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(*params)


# The papers, in float64.


def adam(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    return adamw(p, g + h["weight_decay"] * p, state, {**h, "weight_decay": 0.0}, t)


def _moments(g: Tensor, state: State, h: Mapping[str, Any]) -> None:
    beta1, beta2, *_ = h["betas"]
    state["state1"] = beta1 * state["state1"] + (1 - beta1) * g
    state["state2"] = beta2 * state["state2"] + (1 - beta2) * g * g


def _ratio(state: State, h: Mapping[str, Any], t: int, slow: Tensor | float = 0.0) -> Tensor:
    beta1, beta2, *_ = h["betas"]
    corrected = state["state1"] / (1 - beta1**t) + slow
    return corrected / ((state["state2"] / (1 - beta2**t)).sqrt() + h["eps"])


def adamw(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    _moments(g, state, h)
    return p - h["lr"] * h["weight_decay"] * p - h["lr"] * _ratio(state, h, t)


def ademamix(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    """arXiv 2409.03137, Algorithm 1 and the schedulers of section 3."""
    beta1, _, beta3 = h["betas"]
    alpha, beta = h["alpha"], beta3
    if h["t_alpha"]:
        alpha = min(t * alpha / h["t_alpha"], alpha)
    if h["t_beta3"]:
        share = min(t / h["t_beta3"], 1.0)
        start_, end = math.log(beta1), math.log(beta3)
        beta = min(math.exp(start_ * end / ((1 - share) * end + share * start_)), beta3)
    _moments(g, state, h)
    state["state3"] = beta * state["state3"] + (1 - beta) * g
    return p - h["lr"] * (_ratio(state, h, t, alpha * state["state3"]) + h["weight_decay"] * p)


def lion(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    """arXiv 2302.06675, Program 1."""
    beta1, beta2 = h["betas"]
    direction = torch.sign(beta1 * state["state1"] + (1 - beta1) * g)
    state["state1"] = beta2 * state["state1"] + (1 - beta2) * g
    return p - h["lr"] * (direction + h["weight_decay"] * p)


def lamb(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    """arXiv 1904.00962, Algorithm 2, with phi the identity."""
    _moments(g, state, h)
    update = _ratio(state, h, t) + h["weight_decay"] * p
    return p - h["lr"] * p.norm() / update.norm() * update


def sgd(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    return _momentum(p, g + h["weight_decay"] * p, state, h, t)


def _momentum(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    if h["momentum"]:
        m = state["state1"] = g if t == 1 else h["momentum"] * state["state1"] + (1 - h["dampening"]) * g
        g = g + h["momentum"] * m if h["nesterov"] else m
    return p - h["lr"] * g


def lars(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    """arXiv 1708.03888, Algorithm 1."""
    rate = h["trust_coefficient"] * p.norm() / (g.norm() + h["weight_decay"] * p.norm() + h["eps"])
    return _momentum(p, rate * (g + h["weight_decay"] * p), state, h, t)


def rmsprop(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    g = g + h["weight_decay"] * p
    state["state2"] = h["alpha"] * state["state2"] + (1 - h["alpha"]) * g * g
    update = g / (state["state2"].sqrt() + h["eps"])
    if h["momentum"]:
        update = state["state1"] = h["momentum"] * state["state1"] + update
    return p - h["lr"] * update


def adagrad(p: Tensor, g: Tensor, state: State, h: Mapping[str, Any], t: int) -> Tensor:
    g = g + h["weight_decay"] * p
    state["state2"] = state["state2"] + g * g
    return p - h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (state["state2"].sqrt() + h["eps"])


RULES: dict[type[BlockwiseOptimizer], Rule] = {
    Adam: adam,
    AdamW: adamw,
    AdEMAMix: ademamix,
    Lion: lion,
    LAMB: lamb,
    LARS: lars,
    SGD: sgd,
    RMSprop: rmsprop,
    Adagrad: adagrad,
}


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (AdEMAMix, {"lr": 1e-2, "betas": (0.9, 0.99, 0.999), "t_alpha": 150, "t_beta3": 100, "weight_decay": 0.1}),
        (AdEMAMix, {"lr": 1e-2, "betas": (0.9, 0.99, 0.999), "alpha": 2.0}),
        (LAMB, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
        (LAMB, {"lr": 1e-2, "eps": 1e-6}),
        (LARS, {"lr": 1.0}),
        (LARS, {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        (LARS, {"lr": 1.0, "momentum": 0.9, "dampening": 0.3, "trust_coefficient": 0.001}),
    ],
)
def test_the_papers(algorithm: type[BlockwiseOptimizer], settings: dict[str, Any]) -> None:
    got, _, _ = trajectory(functools.partial(algorithm, **settings), torch.float32)
    h = algorithm([nn.Parameter(start())], **settings).defaults
    p, state = start().double(), {f"state{i}": torch.zeros(SHAPE).double() for i in (1, 2, 3)}
    largest, update = 0.0, 0.0
    for step in range(STEPS):
        moved = RULES[algorithm](p, gradient(step).double(), state, h, step + 1)
        largest, update = max(largest, moved.abs().max().item()), max(update, (moved - p).abs().max().item())
        p = moved
    # An update of AdEMAMix cancels: its slow moment is weighed alpha-fold.
    scale = 1 + h["alpha"] if algorithm is AdEMAMix else 1.0
    bound = accumulated({**h, "trust": algorithm in (LAMB, LARS)}, largest, update * scale)
    assert bound < 2 * update, "the bound must tell two updates more or less"
    torch.testing.assert_close(got.double(), p, rtol=0, atol=bound)


def test_lions_paper() -> None:
    """Directions are signs: where a sum of rounded values is within their roundings of zero, either sign is right."""
    h = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    got, _, _ = trajectory(functools.partial(Lion, **h), torch.float32)
    p, state = start().double(), {"state1": torch.zeros(SHAPE).double()}
    either = torch.zeros(SHAPE).double()
    for step in range(STEPS):
        g = gradient(step).double()
        direction = h["betas"][0] * state["state1"] + (1 - h["betas"][0]) * g
        either += direction.abs() <= EPS * (1.5 / (1 - h["betas"][1]) + 2) * g.abs().max()
        p = lion(p, g, state, h, step + 1)
    assert either.mean() < 0.1, "seldom, else the test would say nothing"
    bound = accumulated(h, start().abs().max().item(), h["lr"]) + 2 * h["lr"] * either
    assert bool(((got.double() - p).abs() <= bound).all())


# States in codes.


def decoded(codes: Tensor, absmax: Tensor, bits: int, *, signed: bool) -> Tensor:
    """In float64, flat, by the formats' definitions."""
    if bits == 4:
        book = torch.tensor(FOUR_BIT_SIGNED if signed else FOUR_BIT_ZERO_FREE, dtype=torch.float64)
        codes = torch.stack((codes.view(-1) // 16, codes.view(-1) % 16), 1)
    else:
        book = torch.tensor(DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED, dtype=torch.float64)
    codes = codes.reshape(-1)
    return book[codes.long()] * scales(absmax, bits)[: codes.numel()]


def scales(absmax: Tensor, bits: int) -> Tensor:
    return absmax.double().view(-1).repeat_interleave({8: 256, 4: 128}[bits])


HALF_STEP = {
    (8, True): DYNAMIC_SIGNED_BOUND,
    (8, False): DYNAMIC_UNSIGNED_BOUND,
    (4, True): max(b - a for a, b in itertools.pairwise(FOUR_BIT_SIGNED)) / 2,
    (4, False): FOUR_BIT_ZERO_FREE[0],  # of a zero
}


def test_each_step_from_states_in_codes(coded_rule: Any) -> None:
    """The parameter is updated by the rule from the states as they are held; the new codes are within half a step of the new states.

    An odd number of elements, and a last block that isn't full.
    """
    numel = 1001
    param = nn.Parameter(torch.randn(numel))
    optimizer = coded_rule([param], min_8bit_size=0)
    h = {**optimizer.defaults}
    state = {f"state{i}": torch.zeros(numel).double() for i in (1, 2, 3)}
    if "initial_accumulator_value" in h:
        state["state2"] += h["initial_accumulator_value"]
    for step in range(1, 21):
        param.grad = torch.randn(numel)
        p, g = param.detach().double(), param.grad.double()
        optimizer.step()
        expected = RULES[coded_rule.algorithm](p, g, state, h, step)
        update = (expected - p).abs().max().item()
        if coded_rule.algorithm is Lion:  # no tie of its random numbers is as near as a rounding
            update = 0.0
        alone = accumulated({**h, "betas": (), "momentum": 0.0}, p.abs().max().item(), update * (1 + h.get("alpha", 0)), steps=1)
        norms = numel * EPS * update if coded_rule.whole else 0.0
        torch.testing.assert_close(param.detach().double(), expected, rtol=0, atol=alone + norms)
        held = optimizer.state[param]
        assert held["step"] == step
        for name in [key for key in held if key.startswith("state")]:
            signed = name != "state2"
            absmax = held[name.replace("state", "absmax")]
            got = decoded(held[name], absmax, coded_rule.bits, signed=signed)[:numel]
            share = HALF_STEP[coded_rule.bits, signed] + (12 + (numel if coded_rule.whole else 0)) * EPS
            bound = scales(absmax, coded_rule.bits)[:numel] * share
            assert bool(((got - state[name]).abs() <= bound).all()), f"step {step}, {name}"
            state[name] = got


def test_muons_8_bit_step_is_the_32_bit_step_from_what_is_held() -> None:
    shape = (40, 60)
    param, twin = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizer, wide = Muon([param], optim_bits=8, min_8bit_size=0), Muon([twin])
    for step in range(20):
        param.grad = twin.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        wide.step()
        assert torch.equal(param, twin)
        held, exact = optimizer.state[param], wide.state[twin]["state1"]
        got = decoded(held["state1"], held["absmax1"], 8, signed=True).view(shape)
        bound = scales(held["absmax1"], 8)[: exact.numel()].view(shape) * (DYNAMIC_SIGNED_BOUND + EPS)
        assert bool(((got - exact).abs() <= bound).all())
        exact.copy_(got)
