"""AdamW8bit against torch.optim.AdamW, and against the 8-bit rule in float64."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from q_core.formats.codebooks import DYNAMIC_SIGNED, DYNAMIC_SIGNED_BOUND, DYNAMIC_UNSIGNED
from q_core.specs.bounds import FACTOR
from q_optim import AdamW8bit, state_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """Large enough for 8 bits with a partial block, small enough for 32, zero-dimensional, and not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in ((70, 100), (64,), (), (8, 4, 16, 16))]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return [nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def decode(codes: Tensor, absmax: Tensor, *, signed: bool, blocksize: int = 256) -> Tensor:
    book = torch.tensor((DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED), dtype=torch.float64)
    scales = absmax.double().repeat_interleave(blocksize)[: codes.numel()]
    return book[codes.long().reshape(-1)] * scales


def test_32_bit_path_is_torchs_adamw() -> None:
    ours, theirs = parameters(), parameters()
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    train(AdamW8bit(ours, min_8bit_size=10**9, **settings), ours, range(50))
    train(torch.optim.AdamW(theirs, **settings), theirs, range(50))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_8_bit_rule_in_float64() -> None:
    """Each step, from the states as they are held, by the rule in float64; codes decode to the new moments within the maps' bounds."""
    lr, beta1, beta2, eps, decay = 1e-2, 0.9, 0.99, 1e-8, 0.1
    param = nn.Parameter(torch.randn(5000))
    optimizer = AdamW8bit([param], lr, (beta1, beta2), eps, decay)
    for step in range(1, 11):
        param.grad = torch.randn(5000)
        state = optimizer.state[param]
        m, v, p = torch.zeros(5000).double(), torch.zeros(5000).double(), param.detach().double()
        if state:
            m = decode(state["state1"], state["absmax1"], signed=True)
            v = decode(state["state2"], state["absmax2"], signed=False)
        optimizer.step()
        g = param.grad.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        p = p * (1 - lr * decay) - lr * (m / (1 - beta1**step)) / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)
        share = FACTOR[torch.float32] * torch.finfo(torch.float32).eps
        torch.testing.assert_close(param.detach().double(), p, rtol=share, atol=share * lr / (1 - beta2) ** 0.5)

        state = optimizer.state[param]
        assert state["step"] == step
        for name, moment, signed in (("1", m, True), ("2", v, False)):
            held = decode(state[f"state{name}"], state[f"absmax{name}"], signed=signed)
            scales = state[f"absmax{name}"].double().repeat_interleave(256)[:5000]
            assert bool(((held - moment).abs() <= scales * (DYNAMIC_SIGNED_BOUND + share)).all())


@dtypes
def test_trains_like_adamw(dtype: torch.dtype) -> None:
    """A regression's loss falls as far as torch's optimizer takes it in float32, within 2 % of where it began."""
    losses = []
    for make, precision in ((AdamW8bit, dtype), (torch.optim.AdamW, torch.float32)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(precision)
        x = torch.randn(64, 64)
        y = torch.tanh(x @ torch.randn(64, 64) / 8)
        optimizer = make(model.parameters(), lr=1e-2)
        for _ in range(40):
            loss = nn.functional.mse_loss(model(x.to(precision)).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    start = y.square().mean().item()
    assert losses[1] < start / 10
    assert losses[0] < losses[1] + 0.02 * start


@dtypes
@pytest.mark.parametrize("through_a_file", [True, False])
def test_resume_is_exact(dtype: torch.dtype, through_a_file: bool) -> None:
    straight, resumed = parameters(dtype), parameters(dtype)
    train(AdamW8bit(straight, lr=0.01), straight, range(12))

    first = AdamW8bit(resumed, lr=0.01)
    train(first, resumed, range(7))
    state = first.state_dict()
    if through_a_file:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    second = AdamW8bit(resumed, lr=5.0)
    second.load_state_dict(state)
    train(second, resumed, range(7, 12))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


def test_loaded_states_are_copies_and_keep_their_dtypes() -> None:
    params = parameters(torch.bfloat16)
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


def broken(state: dict[str, Any], how: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    first = state["state"][0]
    match how:
        case "missing":
            del first["absmax2"]
        case "short":
            first["absmax1"] = first["absmax1"][:-1]
        case "dtype":
            first["state1"] = first["state1"].float()
        case "shape":
            first["state2"] = first["state2"].reshape(-1)
        case "step":
            first["step"] = torch.tensor(1.0)
        case "blocksize":
            state["param_groups"][0]["blocksize"] = 128
        case "beta":
            state["param_groups"][0]["betas"] = (0.9, 1.0)
        case "unknown":
            state["state"][99] = first
        case "fewer":
            state["param_groups"][0]["params"].pop()
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "expected.*absmax2"),
        ("short", "absmax1 is"),
        ("dtype", "state1 is torch.float32"),
        ("shape", "state2 is"),
        ("step", "step is"),
        ("blocksize", "absmax1 is"),
        ("beta", r"betas\[1\]"),
        ("unknown", "99"),
        ("fewer", "as many parameters"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(how: str, message: str) -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(before, how))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items() if key != "step")


def test_another_optimizers_state_is_refused() -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params)
    train(theirs, params, range(1))
    with pytest.raises(ValueError, match="another optimizer"):
        AdamW8bit(params).load_state_dict(theirs.state_dict())


@dtypes
@settings(max_examples=15, deadline=None)
@given(numel=st.integers(1, 6000), steps=st.integers(1, 5), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e3]))
def test_zero_gradients_move_nothing(dtype: torch.dtype, numel: int, steps: int, scale: float) -> None:
    """Where the peer drifts: elements whose gradient is always zero, beside others whose gradient is not."""
    param = nn.Parameter(torch.randn(numel).to(dtype))
    before = param.detach().clone()
    idle = torch.rand(numel) < 0.5
    optimizer = AdamW8bit([param], lr=0.1, weight_decay=0.0, min_8bit_size=0)
    for _ in range(steps):
        param.grad = torch.where(idle, 0.0, torch.randn(numel) * scale).to(dtype)
        optimizer.step()
    assert torch.equal(param[idle], before[idle])


def test_states_take_a_quarter() -> None:
    sizes = []
    for make in (AdamW8bit, torch.optim.AdamW):
        param = nn.Parameter(torch.randn(512, 512))
        optimizer = make([param])
        param.grad = torch.randn(512, 512)
        optimizer.step()
        sizes.append(state_bytes(optimizer))
    assert sizes[0] <= 0.26 * sizes[1]


def test_groups_have_settings_and_counts_of_their_own() -> None:
    params = parameters()
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


def test_parameters_of_one_group_may_be_at_different_steps() -> None:
    together, alone = parameters(), parameters()
    optimizer = AdamW8bit(together, lr=0.1)
    for step in range(4):
        for index, param in enumerate(together):
            param.grad = torch.full_like(param, step + 1.0) if step >= index else None
        optimizer.step()
    for index, param in enumerate(alone):
        single = AdamW8bit([param], lr=0.1)
        for step in range(index, 4):
            param.grad = torch.full_like(param, step + 1.0)
            single.step()
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


def test_closure() -> None:
    param = nn.Parameter(torch.ones(10))
    optimizer = AdamW8bit([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 10.0
    assert bool((param < 1).all())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    ],
)
def test_schedulers(schedule: Any) -> None:
    ours, theirs = parameters(), parameters()
    for params, optimizer in ((ours, AdamW8bit(ours, min_8bit_size=10**9)), (theirs, torch.optim.AdamW(theirs))):
        scheduler = schedule(optimizer)
        for step in range(8):
            train(optimizer, params, range(step, step + 1))
            scheduler.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_grad_scaler() -> None:
    param = nn.Parameter(torch.randn(5000))
    optimizer = AdamW8bit([param], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = param.detach().clone()
    scaler.scale(param.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, before)
    optimizer.zero_grad()
    scaler.scale(param.square().sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(param, before)
    assert bool(torch.isfinite(param).all())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr is -1.0"),
        ({"lr": float("nan")}, ValueError, "lr is nan"),
        ({"lr": float("inf")}, ValueError, "lr is inf"),
        ({"lr": "fast"}, TypeError, "lr is str"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\]"),
        ({"betas": 0.9}, ValueError, "betas is 0.9"),
        ({"eps": -1e-8}, ValueError, "eps"),
        ({"weight_decay": True}, TypeError, "weight_decay is bool"),
        ({"min_8bit_size": 4096.0}, ValueError, "min_8bit_size"),
        ({"blocksize": 100}, ValueError, "blocksize is 100"),
    ],
)
def test_settings_are_checked_up_front(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW8bit(parameters(), **settings)
    optimizer = AdamW8bit(parameters())
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": parameters(), **settings})
    assert len(optimizer.param_groups) == 1


def test_what_it_cannot_update_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        AdamW8bit([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    table = nn.Embedding(1000, 8, sparse=True)
    dense = nn.Parameter(torch.ones(4))
    optimizer = AdamW8bit([dense, *table.parameters()], lr=0.1)
    table(torch.tensor([1, 2])).sum().backward()
    dense.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"\[1000, 8\] is sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(4))
