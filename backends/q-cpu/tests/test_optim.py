"""Optimizer steps of every rule: against torch.optim, against the papers' formulas in float64, and states bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import ALL_STATES, RULES, WHOLE_TENSOR_RULES
from q_cpu import optim

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)
BOOKS = {"state1": SIGNED, "state2": UNSIGNED, "state3": SIGNED}
EPS = torch.finfo(torch.float32).eps

DEFAULTS: dict[str, Any] = {
    "beta1": 0.9, "beta2": 0.999, "beta3": 0.99, "alpha": 4.0, "eps": 1e-8, "dampening": 0.1, "nesterov": False, "trust_coefficient": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """A rule with its settings, in the order of the op's arguments."""

    name: str
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

    @property
    def states(self) -> tuple[str, ...]:
        return RULES[self.name].names(self.beta1)

    def arguments(self, step: int) -> tuple[Any, ...]:
        return (*astuple(self)[1:], step)


def with_settings(name: str, *, lr: float = 1e-2, weight_decay: float = 0.1, **changes: Any) -> Rule:
    """A rule with usual settings; those it doesn't use are neutral."""
    used = {s: value if s in RULES[name].settings else type(value)() for s, value in DEFAULTS.items()}
    return Rule(name, lr=lr, weight_decay=weight_decay, **(used | changes))


VARIANTS = {name: with_settings(name) for name in RULES} | {
    "sgd-nesterov": with_settings("sgd", nesterov=True, dampening=0.0),
    "sgd-plain": with_settings("sgd", beta1=0.0, dampening=0.0),
    "rmsprop-plain": with_settings("rmsprop", beta1=0.0),
    "lars-plain": with_settings("lars", beta1=0.0, dampening=0.0),
    "adamw-no-decay": with_settings("adamw", weight_decay=0.0),
}
every_rule = pytest.mark.parametrize("rule", VARIANTS.values(), ids=VARIANTS)

# The formulas of q_core.ops.optim, in the dtype of what they are given: p, g, the states by name, the rule, the step.
States = dict[str, Tensor]


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == 0, 0, a / b)


def _moments(g: Tensor, s: States, r: Rule) -> None:
    s["state1"] = r.beta1 * s["state1"] + (1 - r.beta1) * g
    s["state2"] = r.beta2 * s["state2"] + (1 - r.beta2) * (g * g)


def _corrected(s: States, r: Rule, t: int, extra: Tensor | float = 0.0) -> Tensor:
    return _over(s["state1"] / (1 - r.beta1**t) + extra, (s["state2"] / (1 - r.beta2**t)).sqrt() + r.eps)


def _adam(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    _moments(g + r.weight_decay * p, s, r)
    return p - r.lr * _corrected(s, r, t)


def _adamw(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    _moments(g, s, r)
    return p * (1 - r.lr * r.weight_decay) - r.lr * _corrected(s, r, t)


def _ademamix(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    _moments(g, s, r)
    s["state3"] = r.beta3 * s["state3"] + (1 - r.beta3) * g
    return p * (1 - r.lr * r.weight_decay) - r.lr * _corrected(s, r, t, r.alpha * s["state3"])


def _lion(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    direction = (r.beta1 * s["state1"] + (1 - r.beta1) * g).sign()
    s["state1"] = r.beta2 * s["state1"] + (1 - r.beta2) * g
    return p * (1 - r.lr * r.weight_decay) - r.lr * direction


def _momentum(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    if not r.beta1:
        return p - r.lr * g
    s["state1"] = g if t == 1 else r.beta1 * s["state1"] + (1 - r.dampening) * g
    return p - r.lr * (g + r.beta1 * s["state1"] if r.nesterov else s["state1"])


def _sgd(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    return _momentum(p, g + r.weight_decay * p, s, r, t)


def _rmsprop(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    g = g + r.weight_decay * p
    s["state2"] = r.beta2 * s["state2"] + (1 - r.beta2) * (g * g)
    update = _over(g, s["state2"].sqrt() + r.eps)
    if r.beta1:
        update = s["state1"] = r.beta1 * s["state1"] + update
    return p - r.lr * update


def _adagrad(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    g = g + r.weight_decay * p
    s["state2"] = s["state2"] + g * g
    return p - r.lr * _over(g, s["state2"].sqrt() + r.eps)


def _lamb(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    _moments(g, s, r)
    update = _corrected(s, r, t) + r.weight_decay * p
    ratio = p.norm() / update.norm() if p.any() and update.any() else 1.0
    return p - r.lr * ratio * update


def _lars(p: Tensor, g: Tensor, s: States, r: Rule, t: int) -> Tensor:
    divisor = g.norm() + r.weight_decay * p.norm() + r.eps
    ratio = r.trust_coefficient * p.norm() / divisor if p.any() and g.any() else 1.0
    return _momentum(p, (g + r.weight_decay * p) * ratio, s, r, t)


FORMULAS: dict[str, Callable[[Tensor, Tensor, States, Rule, int], Tensor]] = {
    "adam": _adam, "adamw": _adamw, "ademamix": _ademamix, "lion": _lion, "sgd": _sgd, "rmsprop": _rmsprop, "adagrad": _adagrad,
    "lamb": _lamb, "lars": _lars,
}  # fmt: skip


@dataclass
class State8bit:
    """Codes and scales of one parameter's states, as q_optim holds them."""

    codes: dict[str, Tensor]
    absmax: dict[str, Tensor]

    @staticmethod
    def zeros(rule: Rule, numel: int, blocksize: int = 256) -> State8bit:
        return State8bit(
            {s: torch.full((numel,), 0 if s == "state2" else 127, dtype=torch.uint8) for s in rule.states},
            {s: torch.zeros(-(-numel // blocksize)) for s in rule.states},
        )

    def clone(self) -> State8bit:
        return State8bit({s: x.clone() for s, x in self.codes.items()}, {s: x.clone() for s, x in self.absmax.items()})

    def decoded(self, blocksize: int = 256) -> States:
        return {
            s: BOOKS[s][codes.long()] * self.absmax[s].repeat_interleave(blocksize)[: codes.numel()]
            for s, codes in self.codes.items()
        }

    def tensors(self) -> list[Tensor]:
        return [*self.codes.values(), *self.absmax.values()]


def step_8bit(
    rule: Rule,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State8bit],
    step: int,
    blocksize: int = 256,
    skipped: Sequence[Tensor] = (),
) -> None:
    held = [[state.codes[s] for state in states] if s in rule.states else [] for s in ALL_STATES]
    scales = [[state.absmax[s] for state in states] if s in rule.states else [] for s in ALL_STATES]
    optim.optimizer_step_8bit(rule.name, params, grads, *held, *scales, skipped, SIGNED, UNSIGNED, *rule.arguments(step), blocksize)


def step_32bit(
    rule: Rule, params: list[Tensor], grads: list[Tensor], states: list[States], step: int, skipped: Sequence[Tensor] = ()
) -> None:
    held = [[state[s] for state in states] if s in rule.states else [] for s in ALL_STATES]
    optim.optimizer_step_32bit(rule.name, params, grads, *held, skipped, *rule.arguments(step))


def zeros_32bit(rule: Rule, numel: int) -> States:
    return {s: torch.zeros(numel) for s in rule.states}


def assert_close(found: Tensor, expected: Tensor, terms: Tensor, roundings: float = 8) -> None:
    """Within some float32 roundings of the terms, and one to the dtype found."""
    finfo = torch.finfo(found.dtype)
    bound = roundings * EPS * terms + finfo.eps / 2 * expected.abs() + finfo.smallest_normal * finfo.eps
    assert ((found.double() - expected).abs() <= bound).all()


def update_terms(before: Tensor, g: Tensor, rule: Rule) -> Tensor:
    """What the terms of an update over sqrt(v) may come to, where they cancel each other.

    Such an update is at most 1 / sqrt(1 - beta2) (arXiv 1412.6980, 2.1); coupled weight decay that cancels the gradient makes the
    relative error of both as much larger.
    """
    largest = torch.full(g.shape, (1 + rule.alpha) / math.sqrt(1 - rule.beta2), dtype=torch.float64)
    if "state2" not in rule.states:
        return torch.zeros_like(largest)
    if rule.name not in ("adam", "rmsprop", "adagrad"):
        return largest
    terms = torch.stack((g.double(), rule.weight_decay * before.double()))
    return largest * terms.abs().sum(0) / terms.sum(0).abs().clamp(min=1e-30)


def assert_parameters(found: Tensor, before: Tensor, expected: Tensor, g: Tensor, rule: Rule, states: States) -> None:
    # Norms are of as many terms as there are elements, and scale every update.
    roundings = 32 if rule.name in WHOLE_TENSOR_RULES else 8
    terms = before.double().abs() + (expected - before.double()).abs() + rule.lr * update_terms(before, g, rule)
    if rule.name == "lion":  # where the sign hangs on a rounding, either is right
        averaged = torch.stack((rule.beta1 * states["state1"].double(), (1 - rule.beta1) * g.double()))
        decided = averaged.sum(0).abs() > 8 * EPS * averaged.abs().sum(0)
        found, expected, terms = found[decided], expected[decided], terms[decided]
    assert_close(found, expected, terms, roundings)


@every_rule
@given(
    numel=st.one_of(st.integers(0, 70), st.integers(1020, 1030)),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_32bit_steps_follow_the_formulas(rule, numel, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(numel, generator=generator).to(dtype)
    states = zeros_32bit(rule, numel)
    for step in range(1, 4):
        g = torch.randn(numel, generator=generator).to(dtype)
        before, old = p.clone(), {s: x.clone() for s, x in states.items()}
        exact = {s: x.double() for s, x in old.items()}
        expected = FORMULAS[rule.name](before.double(), g.double(), exact, rule, step)
        step_32bit(rule, [p], [g], [states], step)
        for s, found in states.items():
            size = 1 + g.double().abs() + before.double().abs() + old[s].abs()
            assert_close(found, exact[s], size * size + exact[s].abs() + update_terms(before, g, rule), 16)
        assert_parameters(p, before, expected, g, rule, old)


@every_rule
@given(
    numel=st.one_of(st.integers(0, 600), st.just(10000)),
    dtype=st.sampled_from(FLOATS),
    blocksize=st.sampled_from((32, 256, 4096)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None)
def test_8bit_steps_follow_the_formulas(rule, numel, dtype, blocksize, seed, encode_blocks):
    """States are those of the formula in float32, but for codes that a last bit sends one step further."""
    generator = torch.Generator().manual_seed(seed)
    state = State8bit.zeros(rule, numel, blocksize)
    p = torch.randn(numel, generator=generator).to(dtype)
    for step in range(1, 5):
        g = torch.randn(numel, generator=generator).mul(torch.rand(numel, generator=generator) ** 8).to(dtype)
        before, old = p.clone(), state.decoded(blocksize)
        exact = {s: x.double() for s, x in old.items()}
        expected = FORMULAS[rule.name](before.double(), g.double(), exact, rule, step)
        single = dict(old)
        FORMULAS[rule.name](before.float(), g.float(), single, rule, step)
        step_8bit(rule, [p], [g], [state], step, blocksize)
        for s in rule.states:
            codes, absmax = encode_blocks(single[s], BOOKS[s], blocksize)
            assert ((state.absmax[s] - absmax).abs() <= 64 * EPS * absmax + 1e-30).all()
            missed = (state.codes[s].int() - codes.int()).abs()
            assert missed.sum() <= 1 + numel // 1000
            assert numel == 0 or missed.max() <= 1
        assert_parameters(p, before, expected, g, rule, old)


@given(
    numel=st.one_of(st.integers(0, 600), st.just(10000)),
    dtype=st.sampled_from(FLOATS),
    blocksize=st.sampled_from((32, 256, 4096)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_adamw_states_are_exact(numel, dtype, blocksize, seed, encode_blocks):
    """Each step of the moments is rounded as torch's, in 32 bits and before they are encoded in 8."""
    generator = torch.Generator().manual_seed(seed)
    rule = with_settings("adamw")
    state, moments = State8bit.zeros(rule, numel, blocksize), zeros_32bit(rule, numel)
    p = torch.randn(numel, generator=generator).to(dtype)
    for step in range(1, 5):
        g = torch.randn(numel, generator=generator).mul(torch.rand(numel, generator=generator) ** 8).to(dtype)
        expected, expected32 = state.decoded(blocksize), dict(moments)
        _moments(g.float(), expected, rule)
        _moments(g.float(), expected32, rule)
        step_8bit(rule, [p], [g], [state], step, blocksize)
        step_32bit(rule, [p.clone()], [g], [moments], step)
        for s in rule.states:
            codes, absmax = encode_blocks(expected[s], BOOKS[s], blocksize)
            assert torch.equal(state.codes[s], codes)
            assert torch.equal(state.absmax[s], absmax)
            assert torch.equal(moments[s], expected32[s])


def torch_optimizer(rule: Rule, param: torch.nn.Parameter) -> torch.optim.Optimizer:
    shared = {"lr": rule.lr, "weight_decay": rule.weight_decay, "foreach": False}
    adam = {"betas": (rule.beta1, rule.beta2), "eps": rule.eps}
    match rule.name:
        case "adam":
            return torch.optim.Adam([param], **shared, **adam)
        case "adamw":
            return torch.optim.AdamW([param], **shared, **adam)
        case "sgd":
            return torch.optim.SGD([param], **shared, momentum=rule.beta1, dampening=rule.dampening, nesterov=rule.nesterov)
        case "rmsprop":
            return torch.optim.RMSprop([param], **shared, alpha=rule.beta2, momentum=rule.beta1, eps=rule.eps)
        case _:
            return torch.optim.Adagrad([param], **shared, eps=rule.eps)


TORCH_HAS = [key for key, rule in VARIANTS.items() if rule.name in ("adam", "adamw", "sgd", "rmsprop", "adagrad")]


@pytest.mark.parametrize("rule", [VARIANTS[key] for key in TORCH_HAS], ids=TORCH_HAS)
def test_32bit_follows_torch_over_a_hundred_steps(rule):
    """Against torch's own in float64, on gradients that depend on the parameter."""
    p = torch.linspace(-3, 3, 1000)
    peer = torch.nn.Parameter(p.double())
    optimizer = torch_optimizer(rule, peer)
    states = zeros_32bit(rule, 1000)
    for step in range(1, 101):
        step_32bit(rule, [p], [p.sin()], [states], step)
        peer.grad = peer.detach().sin()
        optimizer.step()
    # Each step's roundings, which a slope of at most 1 may double over the hundred steps of 1 %.
    assert (p.double() - peer.detach()).abs().max() <= 2 * 100 * 8 * EPS * 3


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@every_rule
def test_a_block_with_a_non_finite_gradient_keeps_everything(poison, dtype, rule):
    state = State8bit.zeros(rule, 700)
    p, g = torch.randn(700).to(dtype), torch.randn(700).to(dtype)
    step_8bit(rule, [p], [g], [state], 1)
    before, old = p.clone(), state.clone()
    g[[300, 310]] = poison
    counter = torch.tensor(5)
    step_8bit(rule, [p], [g], [state], 2, skipped=[counter])
    kept = slice(None) if rule.name in WHOLE_TENSOR_RULES else slice(256, 512)
    assert torch.equal(p[kept], before[kept])
    for s in rule.states:
        assert torch.equal(state.codes[s][kept], old.codes[s][kept])
        assert state.absmax[s][1] == old.absmax[s][1]
    assert counter == 5 + p[kept].numel()
    assert torch.equal(p, before) == (rule.name in WHOLE_TENSOR_RULES)
    assert p.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@every_rule
def test_an_element_with_a_non_finite_gradient_keeps_everything(poison, dtype, rule):
    p, g = torch.linspace(1, 2, 50).to(dtype), torch.ones(50, dtype=dtype)
    states = {s: torch.rand(50) for s in rule.states}
    g[[3, 49]] = poison
    before, old = p.clone(), {s: x.clone() for s, x in states.items()}
    fast = replace(rule, lr=1.0)
    counter = torch.tensor(5)
    step_32bit(fast, [p], [g], [states], 2, skipped=[counter])
    kept = torch.zeros(50, dtype=torch.bool)
    kept[[3, 49]] = True
    kept |= rule.name in WHOLE_TENSOR_RULES
    for found, was in ((p, before), *((states[s], old[s]) for s in rule.states)):
        assert torch.equal(found == was, kept)
    assert counter == 5 + kept.sum()


@every_rule
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_zero_gradients_move_nothing(rule, eps):
    rule = replace(rule, weight_decay=0.0, eps=eps if rule.eps else 0.0)
    p, g = torch.randn(600), torch.randn(600)
    g[::3] = 0
    state, states = State8bit.zeros(rule, 600), zeros_32bit(rule, 600)
    p32, start = p.clone(), p.clone()
    for step in range(1, 30):
        step_8bit(rule, [p], [g], [state], step)
        step_32bit(rule, [p32], [g], [states], step)
    for moved in (p, p32):
        assert torch.equal(moved[::3], start[::3])
        assert moved.isfinite().all()
        assert (moved != start).sum() == 400


def test_weight_decay_alone_shrinks():
    rule = with_settings("adamw", lr=0.5, weight_decay=0.5)
    p = torch.randn(300)
    start = p.clone()
    step_8bit(rule, [p], [torch.zeros(300)], [State8bit.zeros(rule, 300)], 1)
    assert torch.equal(p, start * 0.75)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_norm_of_zero_makes_a_ratio_of_one(name):
    rule = with_settings(name, weight_decay=0.0)
    p = torch.zeros(300)
    step_32bit(rule, [p], [torch.ones(300)], [zeros_32bit(rule, 300)], 1)
    assert_close(p, torch.full((300,), -rule.lr, dtype=torch.float64), torch.full((300,), rule.lr, dtype=torch.float64))


@every_rule
def test_many_tensors_of_any_dtype_are_as_one_by_one(rule):
    sizes = [5, 0, 256, 1, 40000, 257, 0]
    dtypes = [FLOATS[i % 3] for i in range(len(sizes))]
    params = [torch.randn(n).to(d) for n, d in zip(sizes, dtypes, strict=True)]
    grads = [torch.randn(n, 2).to(d)[:, 0] for n, d in zip(sizes, dtypes, strict=True)]
    alone = [p.clone() for p in params]
    states, alone_states = [State8bit.zeros(rule, n) for n in sizes], [State8bit.zeros(rule, n) for n in sizes]
    step_8bit(rule, params, grads, states, 1)
    for p, g, s in zip(alone, grads, alone_states, strict=True):
        step_8bit(rule, [p], [g], [s], 1)
    for a, b in zip(params, alone, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(states, alone_states, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_parameters_that_require_grad_are_updated():
    rule = with_settings("adamw")
    p = torch.nn.Parameter(torch.randn(300))
    before = p.detach().clone()
    with torch.no_grad():
        step_8bit(rule, [p], [torch.ones(300)], [State8bit.zeros(rule, 300)], 1)
    assert (p != before).all()


def test_what_is_not_served_is_declined_in_words():
    p = torch.randn(4, 4)
    u = torch.zeros(16, dtype=torch.uint8)
    for accepts in (optim.optimizer_step_8bit.q_accepts, optim.optimizer_step_32bit.q_accepts):
        assert accepts([p], [u], [u], []) is None
        assert accepts([p, p.double()], [u, u], [u, u], []).startswith("params[1] is torch.float64")
        assert accepts([p.t()], [u], [u], []) == "params[0] is not contiguous"
        assert accepts([p], [u[::2]], [], []) == "state1[0] is not contiguous"
        assert accepts([p], [u], [], [u[::2]]) == "state3[0] is not contiguous"
