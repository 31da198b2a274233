"""The AdamW steps: states bit for bit against torch's own ops, parameters against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from q_core.formats.codebooks import dynamic_map
from q_cpu import optim

pytestmark = pytest.mark.usefixtures("isa")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)


@dataclass(frozen=True, slots=True)
class Rule:
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1

    def arguments(self) -> tuple[float, float, float, float, float]:
        return self.lr, self.beta1, self.beta2, self.eps, self.weight_decay

    def moments(self, m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """In the dtype given; in float32 each step is rounded as the kernel's."""
        return self.beta1 * m + (1 - self.beta1) * g, self.beta2 * v + (1 - self.beta2) * (g * g)

    def parameter(self, p: Tensor, m: Tensor, v: Tensor, step: int) -> Tensor:
        p, m, v = p.double(), m.double(), v.double()
        denominator = v.sqrt() / math.sqrt(1 - self.beta2**step) + self.eps
        return p * (1 - self.lr * self.weight_decay) - self.lr * (m / (1 - self.beta1**step)) / denominator


@dataclass
class State8bit:
    """The 8-bit states of one parameter, as q_optim holds them."""

    m: Tensor
    v: Tensor
    m_absmax: Tensor
    v_absmax: Tensor

    @staticmethod
    def zeros(numel: int, blocksize: int = 256) -> State8bit:
        blocks = -(-numel // blocksize)
        return State8bit(
            torch.full((numel,), 127, dtype=torch.uint8),
            torch.zeros(numel, dtype=torch.uint8),
            torch.zeros(blocks),
            torch.zeros(blocks),
        )

    def clone(self) -> State8bit:
        return State8bit(self.m.clone(), self.v.clone(), self.m_absmax.clone(), self.v_absmax.clone())

    def decoded(self, blocksize: int = 256) -> tuple[Tensor, Tensor]:
        numel = self.m.numel()
        scales = [absmax.repeat_interleave(blocksize)[:numel] for absmax in (self.m_absmax, self.v_absmax)]
        return SIGNED[self.m.long()] * scales[0], UNSIGNED[self.v.long()] * scales[1]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.m, self.v, self.m_absmax, self.v_absmax


def step_8bit(
    params: list[Tensor], grads: list[Tensor], states: list[State8bit], rule: Rule, step: int, blocksize: int = 256
) -> None:
    optim.optimizer_step_8bit(
        "adamw", params, grads, [s.m for s in states], [s.v for s in states], [s.m_absmax for s in states], [s.v_absmax for s in states],
        SIGNED, UNSIGNED, *rule.arguments(), step, blocksize,
    )  # fmt: skip


def assert_updated(found: Tensor, before: Tensor, m: Tensor, v: Tensor, rule: Rule, step: int) -> None:
    """The parameter is the float64 formula's, but for some float32 roundings of its terms and one to its dtype."""
    expected = rule.parameter(before, m, v, step)
    terms = before.double().abs() + (expected - before.double()).abs()
    finfo = torch.finfo(found.dtype)
    bound = 8 * torch.finfo(torch.float32).eps * terms + finfo.eps / 2 * expected.abs() + finfo.smallest_normal * finfo.eps
    assert ((found.double() - expected).abs() <= bound).all()


@given(
    numel=st.one_of(st.integers(0, 600), st.just(10000)),
    dtype=st.sampled_from(FLOATS),
    blocksize=st.sampled_from((32, 256, 4096)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_8bit_states_are_exact(numel, dtype, blocksize, seed, encode_blocks):
    generator = torch.Generator().manual_seed(seed)
    rule, state = Rule(), State8bit.zeros(numel, blocksize)
    p = torch.randn(numel, generator=generator).to(dtype)
    for step in range(1, 5):
        g = torch.randn(numel, generator=generator).mul(torch.rand(numel, generator=generator) ** 8).to(dtype)
        m, v = rule.moments(*state.decoded(blocksize), g.float())
        before = p.clone()
        step_8bit([p], [g], [state], rule, step, blocksize)
        for found, found_absmax, moment, book in ((state.m, state.m_absmax, m, SIGNED), (state.v, state.v_absmax, v, UNSIGNED)):
            codes, absmax = encode_blocks(moment, book, blocksize)
            assert torch.equal(found, codes)
            assert torch.equal(found_absmax, absmax)
        assert_updated(p, before, m, v, rule, step)


@given(numel=st.one_of(st.integers(0, 70), st.integers(1020, 1030)), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_32bit_states_are_exact(numel, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    rule = Rule()
    p = torch.randn(numel, generator=generator).to(dtype)
    state1, state2 = torch.zeros(numel), torch.zeros(numel)
    for step in range(1, 4):
        g = torch.randn(numel, generator=generator).to(dtype)
        m, v = rule.moments(state1, state2, g.float())
        before = p.clone()
        optim.optimizer_step_32bit("adamw", [p], [g], [state1], [state2], *rule.arguments(), step)
        assert torch.equal(state1, m)
        assert torch.equal(state2, v)
        assert_updated(p, before, m, v, rule, step)


def test_32bit_follows_torch_over_a_hundred_steps():
    """Against torch.optim.AdamW in float64, on gradients that depend on the parameter."""
    rule = Rule()
    p = torch.linspace(-3, 3, 1000)
    peer = torch.nn.Parameter(p.double())
    optimizer = torch.optim.AdamW(
        [peer], lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=rule.weight_decay, foreach=False
    )
    state1, state2 = torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 101):
        optim.optimizer_step_32bit("adamw", [p], [p.sin()], [state1], [state2], *rule.arguments(), step)
        peer.grad = peer.detach().sin()
        optimizer.step()
    assert (p.double() - peer.detach()).abs().max() <= 100 * 8 * torch.finfo(torch.float32).eps * 3


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_block_with_a_non_finite_gradient_keeps_everything(poison, dtype):
    rule, state = Rule(), State8bit.zeros(700)
    p, g = torch.randn(700).to(dtype), torch.randn(700).to(dtype)
    step_8bit([p], [g], [state], rule, 1)
    before, old = p.clone(), state.clone()
    g[300] = poison
    step_8bit([p], [g], [state], rule, 2)
    assert torch.equal(p[256:512], before[256:512])
    assert torch.equal(state.m[256:512], old.m[256:512])
    assert torch.equal(state.v[256:512], old.v[256:512])
    assert state.m_absmax[1] == old.m_absmax[1]
    assert state.v_absmax[1] == old.v_absmax[1]
    assert not torch.equal(p[:256], before[:256])
    assert not torch.equal(p[512:], before[512:])
    assert p.isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_an_element_with_a_non_finite_gradient_keeps_everything(poison, dtype):
    p, g = torch.linspace(1, 2, 50).to(dtype), torch.ones(50, dtype=dtype)
    state1, state2 = torch.rand(50), torch.rand(50)
    g[[3, 49]] = poison
    before, old1, old2 = p.clone(), state1.clone(), state2.clone()
    optim.optimizer_step_32bit("adamw", [p], [g], [state1], [state2], *Rule(lr=1.0).arguments(), 1)
    kept = torch.zeros(50, dtype=torch.bool)
    kept[[3, 49]] = True
    for found, was in ((p, before), (state1, old1), (state2, old2)):
        assert torch.equal(found == was, kept)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_zero_gradients_move_nothing(eps):
    rule = Rule(eps=eps, weight_decay=0.0)
    p = torch.randn(600)
    g = torch.randn(600)
    g[::3] = 0
    state, state1, state2 = State8bit.zeros(600), torch.zeros(600), torch.zeros(600)
    p32, start = p.clone(), p.clone()
    for step in range(1, 50):
        step_8bit([p], [g], [state], rule, step)
        optim.optimizer_step_32bit("adamw", [p32], [g], [state1], [state2], *rule.arguments(), step)
    for moved in (p, p32):
        assert torch.equal(moved[::3], start[::3])
        assert moved.isfinite().all()
        assert (moved != start).sum() == 400


def test_weight_decay_alone_shrinks():
    p = torch.randn(300)
    start = p.clone()
    step_8bit([p], [torch.zeros(300)], [State8bit.zeros(300)], Rule(lr=0.5, weight_decay=0.5), 1)
    assert torch.equal(p, start * 0.75)


def test_many_tensors_of_any_dtype_are_as_one_by_one():
    sizes = [5, 0, 256, 1, 40000, 257, 0]
    dtypes = [FLOATS[i % 3] for i in range(len(sizes))]
    params = [torch.randn(n).to(d) for n, d in zip(sizes, dtypes, strict=True)]
    grads = [torch.randn(n, 2).to(d)[:, 0] for n, d in zip(sizes, dtypes, strict=True)]
    alone = [p.clone() for p in params]
    states, alone_states = [State8bit.zeros(n) for n in sizes], [State8bit.zeros(n) for n in sizes]
    rule = replace(Rule(), lr=0.3)
    step_8bit(params, grads, states, rule, 1)
    for p, g, s in zip(alone, grads, alone_states, strict=True):
        step_8bit([p], [g], [s], rule, 1)
    for a, b in zip(params, alone, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(states, alone_states, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def test_parameters_that_require_grad_are_updated():
    p = torch.nn.Parameter(torch.randn(300))
    before = p.detach().clone()
    with torch.no_grad():
        step_8bit([p], [torch.ones(300)], [State8bit.zeros(300)], Rule(), 1)
    assert (p != before).all()


def test_what_is_not_served_is_declined_in_words():
    p = torch.randn(4, 4)
    u = torch.zeros(16, dtype=torch.uint8)
    for accepts in (optim.optimizer_step_8bit.q_accepts, optim.optimizer_step_32bit.q_accepts):
        assert accepts("adamw", [p], [u], [u]) is None
        assert accepts("lion", [p], [u], [u]) == "update rule 'lion', only adamw"
        assert accepts("adamw", [p, p.double()], [u, u], [u, u]).startswith("params[1] is torch.float64")
        assert accepts("adamw", [p.t()], [u], [u]) == "params[0] is not contiguous"
        assert accepts("adamw", [p], [u[::2]], [u]) == "state1[0] is not contiguous"
