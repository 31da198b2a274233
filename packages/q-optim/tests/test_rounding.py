"""Stochastic rounding of bfloat16 parameters: right on average, exact where it can be, and the same when a run is repeated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from q_optim import SGD, AdamW, Muon
from q_optim.update import round_stochastically


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    x=st.floats(min_value=2.0**-126, max_value=2.0**127, width=32, allow_subnormal=False),
    sign=st.sampled_from([-1, 1]),
    seed=st.integers(0, 99),
)
def test_to_a_neighbour(x: float, sign: int, seed: int) -> None:
    """One of the two bfloat16 around a value, which are less than 2^-7 of it apart; itself if it is one."""
    value = torch.full((64,), sign * x)
    rounded = round_stochastically(value, generator(seed)).float()
    assert bool(((rounded - value).abs() < value.abs() * 2.0**-7).all())
    exact = value.bfloat16().float()
    assert torch.equal(round_stochastically(exact, generator(seed)).float(), exact)
    assert len(rounded.unique()) <= 2


def test_what_has_no_neighbours_stays() -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.5])
    assert torch.equal(round_stochastically(special, generator()).nan_to_num(7.0), special.bfloat16().nan_to_num(7.0))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("at", [1.0, -1.0, 1e-20, 3e30])
def test_right_on_average(at: float, share: float) -> None:
    """A value at a share of the way between neighbours goes to the farther one that often, within five standard deviations."""
    trials = 200_000
    low = torch.tensor(at).bfloat16()
    high = (low.view(torch.int16) + 1).view(torch.bfloat16)
    value = low.float() + share * (high.float() - low.float())
    exact = ((value - low.float()) / (high.float() - low.float())).item()
    rounded = round_stochastically(value.expand(trials).contiguous(), generator())
    assert bool(((rounded == low) | (rounded == high)).all())
    went = (rounded == high).float().mean().item()
    assert abs(went - exact) < 5 * math.sqrt(exact * (1 - exact) / trials)


def moved(rounded: bool, bits: int, steps: int = 100, rate: float = 1e-4) -> Tensor:
    """Parameters of 1.0 after steps of a relative size that is lost when it's rounded to the nearest."""
    param = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = AdamW([param], rate, (0.0, 0.0), weight_decay=0.0, optim_bits=bits, stochastic_rounding=rounded)
    for _ in range(steps):
        param.grad = torch.full_like(param, 1e-3)
        optimizer.step()
    return param.detach().double()


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_small_updates_add_up(bits: int) -> None:
    """100 updates of 1e-4 of a weight: lost when rounded to the nearest; else their sum is there, on average over the weights.

    A step's rounding has a variance of at most gap² / 4, the gap being 2^-8 below 1: five standard deviations of the mean. The decoded
    4-bit states are exact, for all elements are alike; eps takes 1e-5 of an update off.
    """
    lost, kept = moved(False, bits), moved(True, bits)
    assert bool((lost == 1).all())
    deviation = math.sqrt(100 / 4) * 2.0**-8 / math.sqrt(kept.numel())
    assert abs(kept.mean().item() - (1 - 100 * 1e-4)) < 5 * deviation + 100 * 1e-4 * 2e-5


def test_elements_and_tensors_and_steps_have_noise_of_their_own() -> None:
    """A mean of many would be right with the same noise for all, and no weight's walk would be."""
    params = [nn.Parameter(torch.ones(4000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = SGD(params, lr=2.0**-9, stochastic_rounding=True)
    ups = []
    for _ in range(2):
        for param in params:
            param.data.fill_(1.0)
            param.grad = torch.ones_like(param)
        optimizer.step()
        ups.append([(param.detach() == 1).float() for param in params])
    (a, b), (c, _) = ups
    for one, other in ((a, b), (a, c), (a[:2000], a[2000:])):
        assert 0.3 < one.mean() < 0.7
        correlation = torch.corrcoef(torch.stack((one, other)))[0, 1].abs()
        assert correlation < 5 / math.sqrt(one.numel())


def test_only_where_asked_for_and_only_bfloat16() -> None:
    with pytest.raises(
        TypeError, match=r"SGD: parameter 0 of shape \[3\] has dtype torch.float16.*stochastic_rounding is for bfloat16"
    ):
        SGD([nn.Parameter(torch.ones(3).half())], stochastic_rounding=True)
    param = nn.Parameter(torch.ones(5000))
    plain = nn.Parameter(torch.ones(5000))
    for each, rounded in ((param, True), (plain, False)):
        each.grad = torch.linspace(-1, 1, 5000)
        SGD([each], stochastic_rounding=rounded).step()
    assert torch.equal(param, plain)


def test_the_same_noise_however_states_are_held(
    variant: Any, make_params: Callable[..., Any], train: Callable[..., None], assert_same: Callable[..., None]
) -> None:
    """Paged states are updated in batches of their own; the global generator has no part in it."""
    runs = []
    for seed, paging in ((1, {}), (2, {"is_paged": True, "paged_budget": 8192})):
        torch.manual_seed(seed)
        params = make_params(torch.bfloat16, matrices=variant.algorithm is Muon)
        optimizer = variant(params, stochastic_rounding=True, min_8bit_size=100, **paging)
        state = torch.get_rng_state()
        train(optimizer, params, range(4))
        assert torch.equal(torch.get_rng_state(), state)
        runs.append((params, optimizer))
    (ours, one), (theirs, other) = runs
    assert_same(ours, theirs, (one, other))
