"""Settings of single parameters: by the optimizer, by the manager of the process, by the module they are in, by their group."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from q_core.optimizers import prefer
from q_optim import AdamW, AdamW8bit, GlobalOptimManager, Lion8bit, PagedAdamW8bit
from q_optim.optimizer import BlockwiseOptimizer

NUMEL = 8192


@pytest.fixture
def manager() -> Iterator[GlobalOptimManager]:
    """The one there is, which forgets what a test said."""
    found = GlobalOptimManager.get_instance()
    yield found
    found.overrides.clear()


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))


def bits_after_a_step(optimizer: BlockwiseOptimizer) -> list[int]:
    """Of the states of each parameter, in order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()

    def bits(param: Tensor) -> int:
        held = optimizer.state[param]["state1"]
        return 32 if held.dtype == torch.float32 else 8 * held.numel() // param.numel()

    return [bits(param) for param in params]


def test_by_the_optimizer() -> None:
    """A parameter, several, or a module."""
    net = model()
    optimizer = AdamW8bit(net.parameters(), min_8bit_size=0)
    optimizer.override(net[0].weight, bits=32)
    assert bits_after_a_step(optimizer) == [32, 8, 8, 8]
    net = model()
    optimizer = AdamW8bit(net.parameters(), min_8bit_size=0)
    optimizer.override([net[0].weight, net[1].bias], optim_bits=4)
    optimizer.override(net[1], optim_bits=32)
    assert bits_after_a_step(optimizer) == [4, 8, 32, 32]


def test_of_any_setting() -> None:
    params = [nn.Parameter(torch.ones(NUMEL)) for _ in range(3)]
    optimizer = AdamW8bit(params, lr=0.1, weight_decay=0.0)
    optimizer.override(params[0], lr=0.0)
    optimizer.override(params[1], lr=0.2, betas=(0.5, 0.5), blocksize=64)
    optimizer.override(params[1], weight_decay=0.5)
    single = nn.Parameter(torch.ones(NUMEL))
    alone = AdamW8bit([single], lr=0.2, betas=(0.5, 0.5), blocksize=64, weight_decay=0.5)
    for step in range(3):
        for param in (*params, single):
            param.grad = torch.randn(NUMEL, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        alone.step()
    assert bool((params[0] == 1).all())
    assert torch.equal(params[1], single)
    assert not torch.equal(params[1], params[2])
    assert optimizer.state[params[1]]["absmax1"].shape == (NUMEL // 64,)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"states": 32}, ValueError, "AdamW8bit.override: there is no setting 'states', expected one of .*optim_bits"),
        ({"bits": 5}, ValueError, "optim_bits is 5"),
        ({"bits": 32, "optim_bits": 8}, TypeError, "bits and optim_bits are the same setting"),
        ({"optim_bits": 5}, ValueError, "optim_bits is 5"),
        ({"lr": -1.0}, ValueError, "lr is -1.0"),
        ({"amsgrad": True}, ValueError, "amsgrad is True"),
    ],
)
def test_what_cant_be_overridden_changes_nothing(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    net = model()
    optimizer = AdamW8bit(net.parameters(), min_8bit_size=0)
    with pytest.raises(error, match=message):
        optimizer.override(net[0].weight, **settings)
    with pytest.raises(ValueError, match=r"a parameter of shape \[3\] is in none of the optimizer's groups"):
        optimizer.override([net[0].weight, nn.Parameter(torch.ones(3))], optim_bits=32)
    assert bits_after_a_step(optimizer) == [8, 8, 8, 8]
    with pytest.raises(ValueError, match=r"parameter 0 of shape \[128, 64\] has states already; override before the first step"):
        optimizer.override(net, optim_bits=32)
    optimizer.override(net, lr=0.5)
    assert bits_after_a_step(optimizer) == [8, 8, 8, 8]


def test_by_the_manager_before_and_after_construction(manager: GlobalOptimManager) -> None:
    net = model()
    manager.register_parameters(net.parameters())
    manager.override_config(net[0].weight, "optim_bits", 32)
    optimizer = AdamW8bit(net.parameters(), min_8bit_size=0)
    manager.override_config([net[1].weight, net[1].bias], key_value_dict={"optim_bits": 32, "lr": 0.5})
    assert bits_after_a_step(optimizer) == [32, 8, 32, 32]
    assert bits_after_a_step(Lion8bit(net.parameters(), min_8bit_size=0)) == [32, 8, 32, 32], "every optimizer of the process"
    assert bits_after_a_step(AdamW8bit(copy.deepcopy(net).parameters(), min_8bit_size=0)) == [8, 8, 8, 8]


def test_the_optimizers_own_are_above_the_managers(manager: GlobalOptimManager) -> None:
    net = model()
    manager.override_config(net.parameters(), "optim_bits", 32)
    optimizer = AdamW(net.parameters(), min_8bit_size=0)
    optimizer.override(net[0].weight, optim_bits=4)
    assert bits_after_a_step(optimizer) == [4, 32, 32, 32]


def test_a_modules_parameter_by_its_name(manager: GlobalOptimManager) -> None:
    """Whichever tensor has the name when it is asked for."""
    net = model()
    manager.register_module_override(net[0], "weight", {"optim_bits": 32})
    net[0].weight = nn.Parameter(torch.randn(128, 64))
    assert bits_after_a_step(AdamW8bit(net.parameters(), min_8bit_size=0)) == [32, 8, 8, 8]


def test_the_managers_mistakes(manager: GlobalOptimManager) -> None:
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()
    net = model()
    for wrong in ({}, {"key": "lr", "value": 0.1, "key_value_dict": {"lr": 0.1}}):
        with pytest.raises(ValueError, match="expected key and value, or key_value_dict"):
            manager.override_config(net[0].weight, **wrong)
    with pytest.raises(TypeError, match="got str, expected parameters"):
        manager.register_parameters(["weight"])  # type: ignore[list-item]
    manager.override_config(net[0].weight, "bits", 32)
    optimizer = AdamW8bit([("first", net[0].weight)])
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match="an override of first: there is no setting 'bits'"):
        optimizer.step()
    assert torch.equal(net[0].weight, before)


def test_by_the_module() -> None:
    """What it prefers holds for the parameter of that name; a copy prefers nothing until it says so."""
    net = model()
    prefer(net[0], "weight", optim_bits=32)
    assert bits_after_a_step(AdamW8bit(net.parameters(), min_8bit_size=0)) == [32, 8, 8, 8]
    assert bits_after_a_step(AdamW8bit(copy.deepcopy(net).parameters(), min_8bit_size=0)) == [8, 8, 8, 8]
    net[0].weight = nn.Parameter(torch.randn(128, 64))
    assert bits_after_a_step(PagedAdamW8bit(net.parameters(), min_8bit_size=0)) == [32, 8, 8, 8]
    overridden = AdamW8bit(net.parameters(), min_8bit_size=0)
    overridden.override(net[0].weight, optim_bits=8)
    assert bits_after_a_step(overridden) == [8, 8, 8, 8]


def test_by_the_group() -> None:
    params = [nn.Parameter(torch.randn(NUMEL)) for _ in range(4)]
    optimizer = AdamW(
        [
            {"params": params[:1]},
            {"params": params[1:2], "optim_bits": 8, "blocksize": 1024},
            {"params": params[2:3], "optim_bits": 4},
            {"params": params[3:], "optim_bits": 8, "min_8bit_size": NUMEL + 1},
        ]
    )
    assert bits_after_a_step(optimizer) == [32, 8, 4, 32]
    assert [optimizer.state[param]["absmax2"].numel() for param in params[1:3]] == [NUMEL // 1024, NUMEL // 128]


def test_small_tensors_are_held_in_32_bits() -> None:
    """The default is bitsandbytes': codes from 4096 elements on."""
    params = [nn.Parameter(torch.randn(numel)) for numel in (4095, 4096)]
    assert bits_after_a_step(AdamW8bit(params)) == [32, 8]
    params = [nn.Parameter(torch.randn(numel)) for numel in (99, 100)]
    assert bits_after_a_step(AdamW8bit(params, min_8bit_size=100)) == [32, 8]


def test_a_checkpoint_needs_the_overrides_it_was_saved_with(
    make_params: Callable[..., Any], train: Callable[..., None], assert_same: Callable[..., None]
) -> None:
    straight, resumed = make_params(), make_params()
    whole, first, second = AdamW8bit(straight), AdamW8bit(resumed), AdamW8bit(resumed)
    for optimizer, params in ((whole, straight), (first, resumed)):
        optimizer.override(params[0], optim_bits=32)
    train(whole, straight, range(4))
    train(first, resumed, range(2))
    with pytest.raises(ValueError, match=r"holds .*expected .*absmax1"):
        second.load_state_dict(first.state_dict())
    second.override(resumed[0], optim_bits=32)
    second.load_state_dict(first.state_dict())
    train(second, resumed, range(2, 4))
    assert_same(straight, resumed, (whole, second))
