"""States in few bits: how far their trajectories may be from exact ones, what never moves, and what they take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from q_core.formats.codebooks import DYNAMIC_SIGNED_BOUND, DYNAMIC_UNSIGNED_BOUND
from q_optim import LAMB, LARS, SGD, AdamW, AdamW4bit, AdamW8bit, Lion, Muon, state_bytes
from q_optim.storage import FOUR_BIT_SIGNED, FOUR_BIT_ZERO_FREE

STEPS = 200
NUMEL = 1001
EPS = torch.finfo(torch.float32).eps
ROUNDING = 30 * EPS
"""A share of a value that covers the roundings of one step in float32."""
BLOCKSIZES = {8: 256, 4: 128}
ERRORS = {8: (DYNAMIC_SIGNED_BOUND, DYNAMIC_UNSIGNED_BOUND), 4: (0.1125, 1 / 32)}
"""Of a value in codes, as a share of its block's scale: a first moment, a second one. In 4 bits half the widest gap of the books; second
moments below the least value of theirs, which is 1/16, would lose more."""


def gradient(step: int) -> Tensor:
    """Each element has its direction, and noise: trajectories lead away, as a training's do."""
    direction = torch.linspace(-0.5, 0.5, NUMEL)[torch.randperm(NUMEL, generator=torch.Generator().manual_seed(0))]
    return direction + torch.where(direction < 0, -1, 1) + 0.1 * torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))


def error_of_codes(optimizer: torch.optim.Optimizer, param: Tensor, number: int, bits: int) -> Tensor:
    """What each element of a state may have lost when it was last encoded."""
    absmax = optimizer.state[param][f"absmax{number}"].double()
    return absmax.repeat_interleave(BLOCKSIZES[bits])[:NUMEL] * ERRORS[bits][number - 1]


def assert_within(got: Tensor, exact: Tensor, bound: Tensor, begin: Tensor, share: float) -> None:
    """Within the bound, which says something: it is less than a share of how far the exact trajectory leads."""
    assert bool(((got.double() - exact).abs() <= bound).all())
    assert bound.mean() < share * (exact - begin).abs().mean()


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_in_8_bits(nesterov: bool) -> None:
    """``m = beta m + g`` passes a code's error on beta-fold: after a step e' = beta e + (half a step of the block's code)."""
    lr, beta = 1e-2, 0.9
    param = nn.Parameter(torch.randn(NUMEL))
    begin = p = param.detach().double()
    optimizer = SGD([param], lr, beta, nesterov=nesterov, optim_bits=8, min_8bit_size=0)
    m, error, bound = (torch.zeros(NUMEL).double() for _ in range(3))
    for step in range(STEPS):
        param.grad = gradient(step)
        optimizer.step()
        g = param.grad.double()
        m, error = beta * m + g, beta * error
        p = p - lr * (g + beta * m if nesterov else m)
        bound += lr * (beta if nesterov else 1.0) * error + ROUNDING * (p.abs() + lr * (g.abs() + m.abs()))
        error += error_of_codes(optimizer, param, 1, 8)
    assert_within(param.detach(), p, bound, begin, share=0.1)


@pytest.mark.parametrize(("bits", "betas", "share"), [(8, (0.8, 0.9), 0.1), (4, (0.5, 0.6), 0.7)])
def test_adamw_in_codes(bits: int, betas: tuple[float, float], share: float) -> None:
    """Each moment is in an interval that grows as above; the update is in that of their quotient.

    The second moment is at least what the present gradient gives, however its code was rounded.
    """
    lr, decay, eps, (beta1, beta2) = 1e-2, 0.01, 1e-8, betas
    param = nn.Parameter(torch.randn(NUMEL))
    begin = p = param.detach().double()
    optimizer = AdamW([param], lr, betas, eps, decay, optim_bits=bits, min_8bit_size=0)
    m, v, m_error, v_error, bound = (torch.zeros(NUMEL).double() for _ in range(5))
    for step in range(1, STEPS + 1):
        param.grad = gradient(step)
        optimizer.step()
        g = param.grad.double()
        m, m_error = beta1 * m + (1 - beta1) * g, beta1 * m_error
        v, v_error = beta2 * v + (1 - beta2) * g * g, beta2 * v_error
        least, most = torch.maximum(v - v_error, (1 - beta2) * g * g), v + v_error

        def update(moment: Tensor, square: Tensor, step: int = step) -> Tensor:
            return moment / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)

        ends = torch.stack([update(moment, square) for moment in (m - m_error, m + m_error) for square in (least, most)])
        exact = update(m, v)
        p = p * (1 - lr * decay) - lr * exact
        bound += lr * torch.maximum(ends.amax(0) - exact, exact - ends.amin(0)) + ROUNDING * (p.abs() + lr * ends.abs().amax(0))
        m_error = m_error + error_of_codes(optimizer, param, 1, bits)
        v_error = v_error + error_of_codes(optimizer, param, 2, bits)
        assert bits == 8 or v.min() > v.max() / 16
    assert_within(param.detach(), p, bound, begin, share)


def test_lion_in_8_bits() -> None:
    """The moment's interval as above; where it has both signs, the direction may be either."""
    lr, (beta1, beta2) = 1e-3, (0.8, 0.9)
    param = nn.Parameter(torch.randn(NUMEL))
    begin = p = param.detach().double()
    optimizer = Lion([param], lr, (beta1, beta2), optim_bits=8, min_8bit_size=0)
    m, error, bound = (torch.zeros(NUMEL).double() for _ in range(3))
    for step in range(STEPS):
        param.grad = gradient(step)
        optimizer.step()
        g = param.grad.double()
        direction = beta1 * m + (1 - beta1) * g
        bound += 2 * lr * (direction.abs() <= beta1 * error + ROUNDING * (m.abs() + g.abs())) + ROUNDING * p.abs()
        p = p - lr * direction.sign()
        m, error = beta2 * m + (1 - beta2) * g, beta2 * error
        error += error_of_codes(optimizer, param, 1, 8)
    assert_within(param.detach(), p, bound, begin, share=0.3)


def test_books_of_4_bits() -> None:
    """The signed one is the peer's dynamic map of 4 bits, the zero-free one the paper's (arXiv 2309.01507, 4.1)."""
    peers = create_dynamic_map(signed=True, max_exponent_bits=3, total_bits=4)
    torch.testing.assert_close(torch.tensor(FOUR_BIT_SIGNED), peers.unique())  # of 256, padded with zeros
    torch.testing.assert_close(torch.tensor(FOUR_BIT_ZERO_FREE), torch.linspace(1 / 16, 1, 16))
    assert min(FOUR_BIT_ZERO_FREE) > 0


# What has no gradient.


def half_idle(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, shape: tuple[int, ...] = (61, 100)) -> Tensor:
    """How far elements moved whose gradients were always zero, beside others whose gradients were not."""
    param = nn.Parameter(torch.randn(shape).to(dtype))
    before = param.detach().clone()
    idle = torch.rand(shape) < 0.5
    optimizer = make([param])
    for step in range(5):
        param.grad = torch.where(idle, 0.0, torch.randn(shape) * 10.0 ** (step - 2)).to(dtype)
        optimizer.step()
    assert not torch.equal(param, before)
    return (param.detach() - before)[idle]


def test_no_gradient_no_move(variant: Any, dtype: torch.dtype) -> None:
    more = {"weight_decay": 0.0, "min_8bit_size": 0}
    if variant.algorithm is Muon:  # its updates mix the elements of a matrix: no gradient means none at all
        param = nn.Parameter(torch.randn(70, 100).to(dtype))
        before = param.detach().clone()
        optimizer = variant([param], **more)
        for _ in range(5):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        assert torch.equal(param, before)
    else:
        assert not half_idle(functools.partial(variant, **more), dtype).any()


@pytest.mark.parametrize("make", [bitsandbytes.optim.Adam8bit, bitsandbytes.optim.AdamW8bit])
def test_the_peers_drift(make: Callable[..., torch.optim.Optimizer]) -> None:
    """What is ours to beat: bitsandbytes' code of zero isn't zero on a CPU. Should this fail, they have mended it."""
    assert half_idle(functools.partial(make, lr=1e-2, weight_decay=0.0), torch.float32).any()


@settings(max_examples=40, deadline=None)
@given(
    numel=st.integers(1, 6000),
    steps=st.integers(1, 5),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e3]),
    bits=st.sampled_from([4, 8, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_gradient_no_move_at_any_size(numel: int, steps: int, scale: float, bits: int, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.randn(numel).to(dtype))
    before = param.detach().clone()
    idle = torch.rand(numel) < 0.5
    optimizer = AdamW([param], lr=0.1, weight_decay=0.0, optim_bits=bits, min_8bit_size=0)
    for _ in range(steps):
        param.grad = torch.where(idle, 0.0, torch.randn(numel) * scale).to(dtype)
        optimizer.step()
    assert torch.equal(param[idle], before[idle])


# Training, and memory.


@pytest.mark.parametrize("make", [AdamW8bit, AdamW4bit])
def test_trains_like_adamw(make: type[AdamW], dtype: torch.dtype) -> None:
    """A regression's loss falls as far as torch's optimizer takes it in float32, within 2 % of where it began."""
    losses = []
    for which, precision in ((make, dtype), (torch.optim.AdamW, torch.float32)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(precision)
        x = torch.randn(64, 64)
        y = torch.tanh(x @ torch.randn(64, 64) / 8)
        optimizer = which(model.parameters(), lr=1e-2)
        for _ in range(40):
            loss = nn.functional.mse_loss(model(x.to(precision)).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    began = y.square().mean().item()
    assert losses[1] < began / 10
    assert losses[0] < losses[1] + 0.02 * began


@pytest.mark.parametrize(("bits", "share"), [(8, 0.26), (4, 0.14)])
def test_states_take_a_quarter_and_less(bits: int, share: float) -> None:
    sizes = []
    for make in (functools.partial(AdamW, optim_bits=bits), torch.optim.AdamW):
        param = nn.Parameter(torch.randn(512, 512))
        optimizer = make([param])
        param.grad = torch.randn(512, 512)
        optimizer.step()
        sizes.append(state_bytes(optimizer))
    assert sizes[0] <= share * sizes[1]


@pytest.mark.parametrize("algorithm", [LAMB, LARS])
def test_8_bits_keep_the_trust_ratio(algorithm: type[LAMB | LARS]) -> None:
    """The peer drops it: a parameter ten times as large takes steps ten times as large, in 8 bits too."""
    moved = []
    for size in (1.0, 10.0):
        param = nn.Parameter(torch.full((5000,), size))
        param.grad = torch.randn(5000, generator=torch.Generator().manual_seed(0))
        algorithm([param], lr=0.1, optim_bits=8).step()
        moved.append((param.detach() - size).norm())
    torch.testing.assert_close(moved[1], 10 * moved[0], rtol=5000 * EPS, atol=0)  # any order of the norms' sums
