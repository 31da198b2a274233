"""N + M steps equal N, save, load and M, bit for bit; and copies of an optimizer go on as it would have."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from q_optim import AdamW, AdamW8bit, Muon, PagedAdamW8bit

BUDGET = 8192
"""Bytes: some of the parameters' states fit, most don't."""


def how(rounded: bool, paged: bool) -> dict[str, Any]:
    return {"stochastic_rounding": rounded, "min_8bit_size": 100, **({"is_paged": True, "paged_budget": BUDGET} if paged else {})}


WAYS = [
    pytest.param(dtype, rounded, paged, id=f"{dtype}{'-rounded' * rounded}{'-paged' * paged}".removeprefix("torch."))
    for paged in (False, True)
    for dtype, rounded in (
        (torch.float32, False),
        (torch.float16, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    )
]


@pytest.mark.parametrize(("dtype", "rounded", "paged"), WAYS)
def test_resumed_from_a_file(
    variant: Any,
    dtype: torch.dtype,
    rounded: bool,
    paged: bool,
    make_params: Callable[..., Any],
    train: Callable[..., None],
    assert_same: Callable[..., None],
    tmp_path: Path,
) -> None:
    matrices = variant.algorithm is Muon
    straight, resumed = (make_params(dtype, matrices=matrices) for _ in range(2))
    whole = variant(straight, **how(rounded, paged))
    train(whole, straight, range(9))

    first = variant(resumed, **how(rounded, paged))
    train(first, resumed, range(5))
    torch.save({"params": resumed, "optimizer": first.state_dict()}, tmp_path / "checkpoint.pt")
    del first, resumed

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = saved["params"]
    second = variant(resumed, **how(rounded, paged), lr=5.0)
    second.load_state_dict(saved["optimizer"])
    train(second, resumed, range(5, 9))
    assert_same(straight, resumed, (whole, second))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on(
    variant: Any,
    duplicate: Callable[[Any], Any],
    paged: bool,
    make_params: Callable[..., Any],
    train: Callable[..., None],
    assert_same: Callable[..., None],
) -> None:
    params = make_params(matrices=variant.algorithm is Muon)
    optimizer = variant(params, **how(False, paged))
    optimizer.override(params[1], lr=0.5)
    train(optimizer, params, range(3))
    copied, its_optimizer = duplicate((params, optimizer))
    train(optimizer, params, range(3, 6))
    train(its_optimizer, copied, range(3, 6))
    assert_same(params, copied, (optimizer, its_optimizer))
    assert all(a is not b for a, b in zip(params, copied, strict=True))


def test_saved_and_loaded_again_and_again(make_params: Callable[..., Any], train: Callable[..., None], assert_same: Any) -> None:
    """A loaded optimizer saves what another can load, and loads a second time itself."""
    straight, resumed = make_params(), make_params()
    whole = PagedAdamW8bit(straight, paged_budget=BUDGET)
    train(whole, straight, range(8))
    optimizer = PagedAdamW8bit(resumed, paged_budget=BUDGET)
    for step in range(0, 8, 2):
        train(optimizer, resumed, range(step, step + 2))
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)
        optimizer.load_state_dict(state)
        optimizer = PagedAdamW8bit(resumed, paged_budget=BUDGET)
        optimizer.load_state_dict(state)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        optimizer.param_groups.pop()
    assert_same(straight, resumed, (whole, optimizer))


def test_loaded_states_are_copies_and_keep_their_dtypes(make_params: Callable[..., Any], train: Callable[..., None]) -> None:
    params = make_params(torch.bfloat16)
    first, second = AdamW8bit(params), AdamW8bit(params)
    train(first, params, range(1))
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    assert {key: value.dtype for key, value in second.state[params[0]].items() if key != "step"} == {
        "state1": torch.uint8,
        "state2": torch.uint8,
        "absmax1": torch.float32,
        "absmax2": torch.float32,
    }
    assert second.state[params[1]]["state1"].dtype == torch.float32
    train(second, params, range(1, 3))
    for index, state in first.state_dict()["state"].items():
        for key, value in state.items():
            assert value == saved["state"][index][key] if key == "step" else torch.equal(value, saved["state"][index][key])


def test_settings_come_from_the_checkpoint(make_params: Callable[..., Any], train: Callable[..., None], assert_same: Any) -> None:
    """As in torch: groups are loaded with their states, lr and precision among their settings."""
    straight, resumed = make_params(), make_params()
    whole = AdamW(straight, lr=1e-2, optim_bits=4, blocksize=64, betas=(0.5, 0.6))
    train(whole, straight, range(4))
    first = AdamW(resumed, lr=1e-2, optim_bits=4, blocksize=64, betas=(0.5, 0.6))
    train(first, resumed, range(2))
    second = AdamW(resumed)
    second.load_state_dict(first.state_dict())
    train(second, resumed, range(2, 4))
    assert_same(straight, resumed, (whole, second))
