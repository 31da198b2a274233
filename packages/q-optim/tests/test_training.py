"""What a training does around a step: accumulation, clipping, scaling, schedules, groups that come later, closures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from q_optim import SGD, Adam, AdamW, AdamW4bit, AdamW8bit, LAMB8bit, Muon, PagedAdamW8bit
from q_optim.optimizer import BlockwiseOptimizer

PRECISIONS = [
    lambda params, **settings: AdamW(params, **settings),
    lambda params, **settings: AdamW8bit(params, min_8bit_size=0, **settings),
    lambda params, **settings: AdamW4bit(params, min_8bit_size=0, **settings),
]
precisions = pytest.mark.parametrize("make", PRECISIONS, ids=["32bit", "8bit", "4bit"])


def regression(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    return model, torch.randn(32, 16), torch.randn(32, 8)


@precisions
def test_gradients_accumulate(make: Callable[..., BlockwiseOptimizer], assert_same: Callable[..., None]) -> None:
    """Two backwards before a step are one of their sum."""
    runs = []
    for halves in (True, False):
        model, x, y = regression()
        optimizer = make(model.parameters(), lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            if halves:
                for part in (slice(0, 16), slice(16, 32)):
                    nn.functional.mse_loss(model(x[part]), y[part], reduction="sum").backward()
            else:
                first = torch.autograd.grad(nn.functional.mse_loss(model(x[:16]), y[:16], reduction="sum"), model.parameters())
                second = torch.autograd.grad(nn.functional.mse_loss(model(x[16:]), y[16:], reduction="sum"), model.parameters())
                for param, a, b in zip(model.parameters(), first, second, strict=True):
                    param.grad = a + b
            optimizer.step()
        runs.append(list(model.parameters()))
    assert_same(*runs)


@precisions
def test_clipping(make: Callable[..., BlockwiseOptimizer]) -> None:
    """The step sees what was clipped; a norm that isn't finite makes every gradient NaN, and then nothing moves."""
    model, x, y = regression()
    optimizer = SGD(model.parameters(), lr=1.0)
    before = [param.detach().clone() for param in model.parameters()]
    (1e6 * nn.functional.mse_loss(model(x), y)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]).norm()
    assert 0.49 < moved <= 0.5 * (1 + 100 * torch.finfo(torch.float32).eps)

    coded = make(model.parameters(), lr=1e-2)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    next(model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    coded.step()
    left = coded.skipped()
    assert left["parameter 0"] > 0
    assert torch.equal(next(model.parameters())[0, 0], before[0][0, 0])
    assert all(bool(param.isfinite().all()) for param in model.parameters())


@precisions
def test_grad_scaler(make: Callable[..., BlockwiseOptimizer]) -> None:
    """It unscales, skips the step of an overflow, and goes on; nothing but what it skipped is missing."""
    param = nn.Parameter(torch.randn(5000))
    twin = nn.Parameter(param.detach().clone())
    optimizer, plain = make([param], lr=0.1), make([twin], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(param.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, twin)
    assert optimizer.state_dict()["state"] == {}
    for _ in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        scaler.scale(param.square().sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        twin.square().sum().backward()
        plain.step()
    assert torch.equal(param, twin), "scales are powers of two"


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
        ),
    ],
    ids=["cosine", "one-cycle", "cyclic", "sequential"],
)
def test_schedulers(schedule: Any, make_params: Callable[..., Any], train: Callable[..., None]) -> None:
    """Two of these turn momentum, too. The learning rates are torch's; what they do to float32 is compared."""
    ours, theirs = make_params(), make_params()
    for params, optimizer in ((ours, AdamW(ours)), (theirs, torch.optim.AdamW(theirs))):
        scheduler = schedule(optimizer)
        for step in range(8):
            train(optimizer, params, range(step, step + 1))
            scheduler.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_schedule_goes_on_where_it_was(
    make_params: Callable[..., Any], train: Callable[..., None], assert_same: Callable[..., None]
) -> None:
    straight, resumed = make_params(), make_params()

    def run(optimizer: Any, scheduler: Any, params: Any, steps: range) -> None:
        for step in steps:
            train(optimizer, params, range(step, step + 1))
            scheduler.step()

    whole = AdamW8bit(straight, lr=0.1)
    run(whole, lr_scheduler.OneCycleLR(whole, 0.1, total_steps=10), straight, range(8))
    first = AdamW8bit(resumed, lr=0.1)
    scheduler = lr_scheduler.OneCycleLR(first, 0.1, total_steps=10)
    run(first, scheduler, resumed, range(5))
    second = AdamW8bit(resumed)
    after = lr_scheduler.OneCycleLR(second, 0.5, total_steps=10)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(scheduler.state_dict())
    run(second, after, resumed, range(5, 8))
    assert_same(straight, resumed, (whole, second))


def test_lr_may_be_a_tensor(make_params: Callable[..., Any], train: Callable[..., None], assert_same: Callable[..., None]) -> None:
    ours, theirs = make_params(), make_params()
    rate = torch.tensor(0.25)
    one, other = AdamW8bit(ours, lr=rate), AdamW8bit(theirs, lr=0.25)
    train(one, ours, range(2))
    train(other, theirs, range(2))
    rate.fill_(0.5)
    other.param_groups[0]["lr"] = 0.5
    train(one, ours, range(2, 4))
    train(other, theirs, range(2, 4))
    assert_same(ours, theirs, (one, other))


def test_maximize(
    variant: Any, make_params: Callable[..., Any], train: Callable[..., None], assert_same: Callable[..., None]
) -> None:
    """Up the gradient is down its negative: exactly, for every book is symmetric where a moment has signs but for its top."""
    ours, theirs = (make_params(matrices=variant.algorithm is Muon) for _ in range(2))
    up, down = variant(ours, maximize=True), variant(theirs)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = -a.grad
        up.step()
        down.step()
    assert_same(ours, theirs, (up, down))


def test_groups_have_settings_and_counts_of_their_own(make_params: Callable[..., Any], train: Callable[..., None]) -> None:
    params = make_params()
    optimizer = AdamW8bit([{"params": params[:1], "lr": 0.0, "weight_decay": 0.0}, {"params": params[1:2]}], lr=0.1)
    before = [param.detach().clone() for param in params]
    train(optimizer, params[:2], range(2))
    optimizer.add_param_group({"params": params[2:], "betas": (0.5, 0.5), "min_8bit_size": 0})
    params[1].grad = None
    for param in (params[0], *params[2:]):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert all(not torch.equal(a, b) for a, b in zip(params[1:], before[1:], strict=True))
    assert [optimizer.state[param]["step"] for param in params] == [3, 2, 1, 1]
    assert optimizer.state[params[2]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("make", [AdamW8bit, PagedAdamW8bit, LAMB8bit])
def test_parameters_of_one_group_may_be_at_different_steps(
    make: Any, make_params: Callable[..., Any], assert_same: Callable[..., None]
) -> None:
    together, alone = make_params(), make_params()
    optimizer = make(together, lr=0.1)
    for step in range(4):
        for index, param in enumerate(together):
            param.grad = torch.full_like(param, step + 1.0) if step >= index else None
        optimizer.step()
    for index, param in enumerate(alone):
        single = make([param], lr=0.1)
        for step in range(index, 4):
            param.grad = torch.full_like(param, step + 1.0)
            single.step()
    assert_same(together, alone)


def test_a_group_of_500_is_500_alone(assert_same: Callable[..., None]) -> None:
    """Of every dtype and size, empty ones too; and it takes no time to speak of."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def make(index: int) -> nn.Parameter:
        generator = torch.Generator().manual_seed(index)
        return nn.Parameter(torch.randn(37 * (index % 11), index % 7, generator=generator).to(dtypes[index % 3]))

    together, alone = ([make(index) for index in range(500)] for _ in range(2))
    optimizer = AdamW8bit(together, lr=0.1, min_8bit_size=300)
    for param in (*together, *alone):
        param.grad = torch.linspace(-1, 1, param.numel()).view(param.shape).to(param.dtype)
    began = time.process_time()
    for _ in range(2):
        optimizer.step()
    assert time.process_time() - began < 5
    for param in alone:
        single = AdamW8bit([param], lr=0.1, min_8bit_size=300)
        for _ in range(2):
            single.step()
    assert_same(together, alone)


@precisions
def test_closure(make: Callable[..., BlockwiseOptimizer]) -> None:
    param = nn.Parameter(torch.ones(10))
    optimizer = make([param], lr=0.1)

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 10.0
    assert bool((param < 1).all())
    assert optimizer.step(None) is None


def test_hooks_and_no_gradients_at_all() -> None:
    param = nn.Parameter(torch.ones(10))
    optimizer = Adam([param], lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]
    assert bool((param == 1).all())
    assert optimizer.state_dict()["state"] == {}
