"""What is refused: settings, parameters, gradients and states that can't be meant, by name, before anything is changed."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import q_optim
from q_optim import LAMB, LARS, SGD, Adagrad, Adam, AdamW, AdamW8bit, AdEMAMix, Lion, Muon, PagedAdamW8bit, RMSprop
from q_optim.optimizer import BlockwiseOptimizer


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(80, 80))


@pytest.mark.parametrize(
    ("algorithm", "settings", "error", "message"),
    [
        (AdamW8bit, {"lr": -1.0}, ValueError, "AdamW8bit: lr is -1.0, expected a number of 0 or more"),
        (AdamW8bit, {"lr": float("nan")}, ValueError, "lr is nan"),
        (AdamW8bit, {"lr": float("inf")}, ValueError, "lr is inf"),
        (AdamW8bit, {"lr": "fast"}, TypeError, "lr is str"),
        (AdamW8bit, {"lr": torch.ones(2)}, TypeError, "lr is Tensor"),
        (AdamW8bit, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0, expected .* below 1"),
        (AdamW8bit, {"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\] is -0.1"),
        (AdamW8bit, {"betas": 0.9}, ValueError, "betas is 0.9, expected 2 numbers"),
        (AdamW8bit, {"betas": (0.9, 0.99, 0.999)}, ValueError, "expected 2 numbers"),
        (AdamW8bit, {"eps": -1e-8}, ValueError, "eps is -1e-08"),
        (AdamW8bit, {"weight_decay": True}, TypeError, "weight_decay is bool"),
        (AdamW8bit, {"min_8bit_size": 4096.0}, TypeError, "min_8bit_size is float, expected an int"),
        (AdamW8bit, {"min_8bit_size": -1}, ValueError, "min_8bit_size is -1"),
        (AdamW8bit, {"blocksize": 100}, ValueError, "blocksize is 100, expected 32 or 64"),
        (AdamW8bit, {"stochastic_rounding": 1}, TypeError, "stochastic_rounding is int"),
        (AdamW8bit, {"maximize": "yes"}, TypeError, "maximize is str"),
        (AdamW, {"amsgrad": True}, ValueError, "amsgrad is True, expected False: the largest second moment"),
        (Adam, {"amsgrad": True}, ValueError, "amsgrad"),
        (Adam, {"optim_bits": 4}, ValueError, "Adam: optim_bits is 4, expected 8 or 32"),
        (AdamW, {"optim_bits": 5}, ValueError, "optim_bits is 5, expected 4 or 8 or 32"),
        (AdamW, {"optim_bits": True}, ValueError, "optim_bits is True"),
        (AdamW, {"foreach": False}, ValueError, "foreach is False, expected None or True: all tensors of a group"),
        (AdamW, {"fused": False}, ValueError, "fused is False"),
        (AdamW, {"capturable": True}, ValueError, "capturable is True, expected False"),
        (AdamW, {"differentiable": True}, ValueError, "differentiable is True"),
        (AdamW, {"args": object()}, ValueError, "args is <object"),
        (AdEMAMix, {"betas": (0.9, 0.99)}, ValueError, "expected 3 numbers"),
        (AdEMAMix, {"alpha": -1.0}, ValueError, "alpha is -1.0"),
        (AdEMAMix, {"t_alpha": -5}, ValueError, "t_alpha is -5"),
        (AdEMAMix, {"t_beta3": 0.5}, TypeError, "t_beta3 is float"),
        (Lion, {"betas": (0.9, 2.0)}, ValueError, r"betas\[1\] is 2.0"),
        (LAMB, {"bias_correction": False}, ValueError, "bias_correction is False, expected True: moments are always corrected"),
        (LAMB, {"adam_w_mode": False}, ValueError, "adam_w_mode is False"),
        (LAMB, {"amsgrad": True}, ValueError, "amsgrad"),
        (functools.partial(LARS, lr=0.1), {"trust_coefficient": -1}, ValueError, "trust_coefficient is -1"),
        (functools.partial(LARS, lr=0.1), {"nesterov": True}, ValueError, "nesterov is True, expected False without momentum"),
        (SGD, {"momentum": 1.0}, ValueError, "momentum is 1.0"),
        (SGD, {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, ValueError, "nesterov is True, .* or with dampening"),
        (RMSprop, {"centered": True}, ValueError, "centered is True, expected False: the mean of the gradients isn't kept"),
        (RMSprop, {"alpha": 1.5}, ValueError, "alpha is 1.5"),
        (Adagrad, {"lr_decay": -1.0}, ValueError, "lr_decay is -1.0"),
        (Adagrad, {"initial_accumulator_value": -1.0}, ValueError, "initial_accumulator_value is -1.0"),
        (Muon, {"ns_steps": 100}, ValueError, "ns_steps is 100, expected 0…99"),
        (Muon, {"ns_steps": 2.5}, TypeError, "ns_steps is float"),
        (Muon, {"ns_coefficients": (1.0, 2.0)}, ValueError, "ns_coefficients is .* expected three numbers"),
        (Muon, {"adjust_lr_fn": "mine"}, ValueError, "adjust_lr_fn is 'mine', expected None or one of"),
    ],
)
def test_settings(algorithm: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    """By the constructor, and in a group, which is then not added."""
    with pytest.raises(error, match=message):
        algorithm([matrix()], **settings)
    optimizer = algorithm([matrix()])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [matrix()], **settings})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("make", "message", "error"),
    [
        (
            functools.partial(AdamW, betta=1),
            "AdamW: there is no argument 'betta', expected those of AdamW and of q_optim",
            TypeError,
        ),
        (functools.partial(AdamW8bit, optim_bits=4), "AdamW8bit: optim_bits is 4, but its states have 8; use AdamW", ValueError),
        (functools.partial(AdamW8bit, optim_bits=32), "AdamW8bit: optim_bits is 32, but its states have 8; use AdamW", ValueError),
        (functools.partial(AdamW, paged_budget=1), "are for paged states; pass is_paged=True", ValueError),
        (functools.partial(AdamW, paged_directory="/"), "are for paged states; pass is_paged=True", ValueError),
        (functools.partial(AdamW, is_paged=1), "is_paged is int", TypeError),
        (functools.partial(PagedAdamW8bit, paged_budget=1.5), "paged_budget is float", TypeError),
        (functools.partial(PagedAdamW8bit, paged_budget=-1), "paged_budget is -1", ValueError),
        (
            functools.partial(PagedAdamW8bit, paged_directory="not/there"),
            "'not/there', expected a directory that exists",
            ValueError,
        ),
    ],
)
def test_arguments(make: Any, message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        make([matrix()])


def test_paging_is_for_all_groups() -> None:
    optimizer = AdamW([matrix()])
    with pytest.raises(ValueError, match="a parameter group has is_paged, but paging is for all groups"):
        optimizer.add_param_group({"params": [matrix()], "is_paged": True})
    assert len(optimizer.param_groups) == 1


def test_arguments_of_both_peers_are_taken() -> None:
    """What means what is done anyway is no mistake."""
    AdamW([matrix()], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, foreach=True, fused=None, capturable=False, differentiable=False)
    AdamW8bit([matrix()], min_8bit_size=4096, optim_bits=8, args=None, is_paged=False)
    SGD([matrix()], lr=torch.tensor(0.1), momentum=0.9, fused=True)


@pytest.mark.parametrize(
    ("param", "error", "message"),
    [
        (nn.Parameter(torch.zeros(3, dtype=torch.float64)), TypeError, r"of shape \[3\] has dtype torch.float64, expected float32"),
        (nn.Parameter(torch.zeros(3, dtype=torch.complex64)), TypeError, "has dtype torch.complex64"),
        (nn.Parameter(torch.zeros(3, device="meta")), ValueError, "is on the meta device and has no values"),
    ],
)
def test_parameters(param: nn.Parameter, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"AdamW8bit: parameter 0 {message}" if message.startswith("of") else message):
        AdamW8bit([param])
    with pytest.raises(error, match=f"AdamW8bit: head {message}" if message.startswith("of") else message):
        AdamW8bit([("head", param)])
    optimizer = AdamW8bit([matrix()])
    with pytest.raises(error, match="AdamW8bit: parameter 1"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_what_isnt_trained_may_be_anything() -> None:
    """Frozen quantized weights are among ``model.parameters()``."""
    frozen = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    trained = matrix()
    optimizer = AdamW8bit([frozen, trained])
    trained.grad = torch.ones(80, 80)
    optimizer.step()
    assert bool((trained < 1).all())
    assert not frozen.any()


def test_muon_takes_matrices() -> None:
    with pytest.raises(ValueError, match=r"Muon: parameter 0 of shape \[3\] has shape \[3\], expected a matrix"):
        Muon([nn.Parameter(torch.ones(3))])


def test_sparse_gradients() -> None:
    table = nn.Embedding(1000, 8, sparse=True)
    dense = nn.Parameter(torch.ones(4))
    optimizer = AdamW8bit([dense, *table.parameters()], lr=0.1)
    table(torch.tensor([1, 2])).sum().backward()
    dense.grad = torch.ones(4)
    with pytest.raises(
        ValueError, match=r"AdamW8bit: the gradient of parameter 1 of shape \[1000, 8\] is sparse, expected a dense one"
    ):
        optimizer.step()
    assert torch.equal(dense, torch.ones(4))
    assert optimizer.state_dict()["state"] == {}


# States.


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
        case "bits":
            state["param_groups"][0]["optim_bits"] = 4
        case "beta":
            state["param_groups"][0]["betas"] = (0.9, 1.0)
        case "unknown":
            state["state"][99] = first
        case "fewer":
            state["param_groups"][0]["params"].pop()
        case "group":
            state["param_groups"].append({**state["param_groups"][0], "params": []})
        case "swapped":
            state["state"][0], state["state"][1] = state["state"][1], state["state"][0]
        case "names":
            names = state["param_groups"][0]["param_names"]
            state["param_groups"][0]["param_names"] = names[::-1]
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"the state of p0 of shape \[70, 100\] holds .*, expected .*absmax2"),
        (
            "short",
            r"p0 of shape \[70, 100\]: absmax1 is torch.float32 \[27\], expected torch.float32 \[28\]; .*blocksize and overrides",
        ),
        ("dtype", "state1 is torch.float32"),
        ("shape", "state2 is"),
        ("step", "step is"),
        ("blocksize", "absmax1 is"),
        ("bits", "state1 is"),
        ("beta", r"betas\[1\]"),
        ("unknown", "99"),
        ("fewer", r"the saved groups have \[3\] parameters, this optimizer's have \[4\]"),
        ("group", r"\[4, 0\] parameters"),
        ("swapped", "the state of p0"),
        ("names", "the saved state has p3 where this optimizer has p0; give parameters in the same order|'p3'.*'p0'"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    how: str, message: str, make_params: Callable[..., Any], train: Callable[..., None]
) -> None:
    params = make_params()
    optimizer = AdamW8bit([(f"p{i}", param) for i, param in enumerate(params)])
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(before, how))
    assert_equal(optimizer.state_dict(), before)


def assert_equal(after: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][index][key]))


@pytest.mark.parametrize("theirs", [torch.optim.AdamW, torch.optim.SGD])
def test_torchs_state_is_refused(theirs: Any, make_params: Callable[..., Any], train: Callable[..., None]) -> None:
    params = make_params()
    other = theirs(params)
    train(other, params, range(1))
    with pytest.raises(
        ValueError, match=r"AdamW8bit.load_state_dict: a parameter group has no \[.*\]; was it saved by another optimizer"
    ):
        AdamW8bit(params).load_state_dict(other.state_dict())


def name(algorithm: Any) -> str:
    found: str = getattr(algorithm, "func", algorithm).__name__
    return found


ALGORITHMS: list[Callable[..., BlockwiseOptimizer]] = [
    Adam, AdamW, AdEMAMix, Lion, LAMB, functools.partial(LARS, lr=0.1, momentum=0.9), functools.partial(SGD, momentum=0.9),
    RMSprop, Adagrad, Muon,
]  # fmt: skip


@pytest.mark.parametrize("other", ALGORITHMS, ids=name)
def test_another_algorithms_state_is_refused(other: Callable[..., BlockwiseOptimizer], train: Callable[..., None]) -> None:
    params = [matrix()]
    saved = other(params)
    train(saved, params, range(1))
    for make in ALGORITHMS:
        if make is not other:
            optimizer = make(params)
            before = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(ValueError, match=f"load_state_dict: the state is of {name(other)}, expected one of {name(make)}"):
                optimizer.load_state_dict(saved.state_dict())
            assert_equal(optimizer.state_dict(), before)


def test_names_are_thin() -> None:
    """Every class that is exported has its algorithm, precision and paging in its name, and nothing else."""
    for name in q_optim.__all__:
        made = getattr(q_optim, name)
        if isinstance(made, type) and issubclass(made, BlockwiseOptimizer):
            optimizer = made([matrix()], lr=0.1)  # type: ignore[call-arg]
            bits = next((bits for bits in (4, 8, 32) if name.endswith(f"{bits}bit")), 32)
            assert optimizer.defaults["optim_bits"] == bits, name
            assert (optimizer._paging is not None) == name.startswith("Paged"), name


def test_a_device_that_no_backend_serves_is_refused_before_any_step() -> None:
    """With the reference refused, and no other backend, nobody serves a CPU."""
    program = (
        "import torch, q_optim\n"
        "model = torch.nn.Linear(8, 8)\n"
        "try:\n"
        "    q_optim.AdamW8bit(model.named_parameters())\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "Q_BACKENDS": "reference", "Q_FALLBACK": "error"}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert said.startswith("AdamW8bit: weight of shape [8, 8] is on cpu, where no backend updates it: optimizer_step_8bit")


def test_a_step_that_a_graph_would_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph is captured of a CPU, so this one is pretended; a real one is tested on GPUs, in integration_tests/gpu."""
    weight = matrix()
    weight.grad = torch.ones_like(weight)
    before, optimizer = weight.detach().clone(), AdamW([weight])
    monkeypatch.setattr("q_optim.optimizer._is_capturing", lambda device: device == weight.device)
    with pytest.raises(RuntimeError, match=r"AdamW: step\(\) is called while a graph of cpu is captured.*call step\(\) after"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state
