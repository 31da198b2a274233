"""A gradient that isn't finite leaves what it would spoil, and is counted: an element, a block of codes, or a whole tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from q_optim import LARS, Adam, AdamW, Muon
from q_optim.optimizer import BlockwiseOptimizer

BAD = [float("nan"), float("inf"), -float("inf")]


def blocks(numel: int, spread: int) -> Tensor:
    """The number of the block, of ``spread`` elements, that each element is in."""
    return torch.arange(numel) // max(spread, 1)


def left_alone(bad: Tensor, spread: int) -> Tensor:
    """What non-finite gradients at ``bad`` leave as it was."""
    number = blocks(bad.numel(), spread)
    return torch.isin(number, number[bad.reshape(-1)]).view(bad.shape)


def held_by(state: dict[str, Any], leave: Tensor, bits: int, blocksize: int) -> dict[str, Tensor]:
    """The parts of a state that belong to those elements, as far as a byte or a scale belongs to them alone."""
    flat, found = leave.reshape(-1), {}
    for key, value in state.items():
        if key.startswith("absmax"):
            found[key] = value.view(-1)[flat[::blocksize]]
        elif key.startswith("state"):
            found[key] = value.view(-1)[flat[::2] if bits == 4 else flat]
    return found


def check(optimizer: BlockwiseOptimizer, param: nn.Parameter, grad: Tensor, bits: int, blocksize: int, spread: int) -> None:
    """One step with this gradient: equal to one where it is finite, nothing elsewhere, and so many counted."""
    leave = left_alone(~grad.isfinite(), spread)
    before, kept = param.detach().clone(), held_by(optimizer.state[param], leave, bits, blocksize)
    counted = optimizer.skipped().get("parameter 0", 0)
    finite_param, finite_optimizer = copy.deepcopy((param, optimizer))
    param.grad, finite_param.grad = grad, grad.nan_to_num(0, 0, 0)
    optimizer.step()
    finite_optimizer.step()
    assert torch.equal(param[leave], before[leave])
    for key, value in held_by(optimizer.state[param], leave, bits, blocksize).items():
        assert torch.equal(value, kept[key]), key
    assert optimizer.skipped().get("parameter 0", 0) - counted == int(leave.sum())
    assert finite_optimizer.skipped() == {}
    go_on = ~leave
    assert torch.equal(param[go_on], finite_param[go_on])
    for key, value in held_by(optimizer.state[param], go_on, bits, blocksize).items():
        assert torch.equal(value, held_by(finite_optimizer.state[finite_param], go_on, bits, blocksize)[key]), key


@pytest.mark.parametrize("bad", BAD)
def test_left_and_counted(variant: Any, dtype: torch.dtype, bad: float) -> None:
    param = nn.Parameter(torch.randn(37, 50).to(dtype))
    optimizer = variant([param], min_8bit_size=0)
    blocksize = {32: 1, 8: 256, 4: 128}[variant.bits]  # of SGD without a momentum too, which has no states in its blocks
    spread = param.numel() if variant.whole else blocksize
    for step in range(4):
        grad = torch.randn(37, 50).to(dtype)
        if step:
            grad.view(-1)[torch.tensor([1, 300, 1849][:step])] = bad
        if step == 0:
            param.grad = grad
            optimizer.step()
        else:
            check(optimizer, param, grad, variant.bits, blocksize, spread)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Odd and tiny ones, scalars, and ones without elements."""
    return draw(
        st.one_of(
            st.just(()),
            st.tuples(st.sampled_from([0, 1, 2, 3, 127, 129, 257, 1000, 4097])),
            st.tuples(st.integers(0, 9), st.integers(0, 300)),
            st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)),
        )
    )


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.to(memory_format=torch.channels_last)
    if layout == "strided" and tensor.dim():
        return torch.cat((tensor, tensor), -1)[..., : tensor.shape[-1]]
    return tensor


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bits=st.sampled_from([4, 8, 32]),
    blocksize=st.sampled_from([32, 64, 128, 1024, 4096]),
    algorithm=st.sampled_from([AdamW, Adam, LARS]),
    layout=st.sampled_from(["contiguous", "channels_last", "strided"]),
    share=st.sampled_from([0.0, 0.002, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bits: int,
    blocksize: int,
    algorithm: type[BlockwiseOptimizer],
    layout: str,
    share: float,
    seed: int,
) -> None:
    if bits not in algorithm.supported_bits:
        bits = 8
    torch.manual_seed(seed)
    param = nn.Parameter(laid_out(torch.randn(shape).to(dtype), layout))
    more: dict[str, Any] = {"momentum": 0.9} if algorithm is LARS else {}
    optimizer = algorithm([param], lr=1e-2, optim_bits=bits, min_8bit_size=0, blocksize=blocksize, **more)  # type: ignore[call-arg]
    spread = max(param.numel(), 1) if algorithm is LARS else 1 if bits == 32 else blocksize
    param.grad = torch.randn(shape).to(dtype)
    optimizer.step()
    assert bool(param.isfinite().all())
    grad = torch.randn(shape).to(dtype)
    check(
        optimizer,
        param,
        torch.where(torch.rand(shape) < share, torch.tensor(BAD[seed % 3]), grad).to(dtype),
        bits,
        blocksize,
        spread,
    )


def test_names_and_first_steps() -> None:
    """By name where there are names; a step that leaves everything is a step all the same, and what follows is right."""
    params = [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(3))]
    optimizer = Adam([("hidden.weight", params[0]), ("hidden.bias", params[1])], lr=0.1)
    assert optimizer.skipped() == {}
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert optimizer.skipped() == {"hidden.weight": 64, "hidden.bias": 3}
    assert all(bool((param == 1).all()) for param in params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(bool((param < 1).all()) for param in params)
    assert optimizer.skipped() == {"hidden.weight": 64, "hidden.bias": 3}


def test_paged_states_too(train: Callable[..., None]) -> None:
    params = [nn.Parameter(torch.randn(30, 400)) for _ in range(2)]
    optimizer = Muon(params, optim_bits=8, is_paged=True, paged_budget=1000)
    train(optimizer, params, range(1))
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.randn(30, 400)
    params[0].grad.view(-1)[7] = float("nan")  # type: ignore[union-attr]
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert optimizer.skipped() == {"parameter 0": 12000}
