"""What bitsandbytes.optim has, is here by the same names and arguments, and states that its wheel saved are taken over."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.optim as theirs
import pytest
import torch
from torch import Tensor, nn

import q_optim
from q_core import ops
from q_core.formats.codebooks import dynamic_map
from q_optim.optimizer import BlockwiseOptimizer

NO_COUNTERPART = {
    "GlobalOptimManager": "no optimizer",
    "PytorchLARS": "an example of theirs, in 32 bits: LARS",
}
CLASSES = sorted(name for name, value in vars(theirs).items() if inspect.isclass(value) and name not in NO_COUNTERPART)
NO_STEP = {"AdEMAMix32bit", "PagedAdEMAMix32bit"}  # their step fails: they make one first moment, where two are used
RUNNING = [name for name in CLASSES if name not in NO_STEP]

SETTINGS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
    "AdamW": {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
    "AdEMAMix": {"lr": 1e-2, "betas": (0.8, 0.95, 0.99), "t_alpha": 8, "t_beta3": 8, "weight_decay": 0.1},
    "Lion": {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
    "LAMB": {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1},
    "LARS": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"lr": 1e-2, "alpha": 0.95, "weight_decay": 0.1},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {"lr": 1e-2, "weight_decay": 0.1},
}
ONE_SECOND_MOMENT = ("RMSprop", "Adagrad")
DIFFERENT_RULES = {
    "LAMB": "in 32 bits they clip the norm of an update, in 8 bits they don't look at it",
    "LARS": "in 32 bits they clip the norm of an update, in 8 bits they don't look at it",
}
SHAPES = ((32, 300), (16, 256), (7,))


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """Their 32-bit steps are compiled, which takes a while."""
    with torch.compiler.set_stance("force_eager"):
        yield


def algorithm(name: str) -> str:
    return name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1 + step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def trained(name: str, steps: int = 3) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(theirs, name)(parameters(), **SETTINGS[algorithm(name)])
    train(optimizer, range(steps))
    return optimizer


def saved(optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """What it saved, through a file."""
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    loaded: dict[str, Any] = torch.load(folder / "optimizer.pt", weights_only=True)
    return loaded


def ours_like(optimizer: torch.optim.Optimizer, name: str, **settings: Any) -> BlockwiseOptimizer:
    """Ours on a copy of the parameters; its settings are to come from the state."""
    copies = [nn.Parameter(param.detach().clone()) for group in optimizer.param_groups for param in group["params"]]
    cls = getattr(q_optim, name)
    made: BlockwiseOptimizer = cls(copies, 1.0, **settings)
    return made


# --- constructors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_are_theirs(name: str) -> None:
    """In the same order up to those of how states are held, and by the same names all of them."""
    expected = list(inspect.signature(getattr(theirs, name).__init__).parameters.values())[2:]
    cls = getattr(q_optim, name)
    own = list(inspect.signature(cls.__init__).parameters.values())[2:]
    settings = [p for p in expected if p.name not in ("optim_bits", "args", "min_8bit_size", "is_paged", "max_unorm")]
    assert [p.name for p in settings] == [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    # Defaults are equal; the learning rate of SGD has one here, as torch's has now.
    for parameter, mine in zip(settings, own, strict=False):
        if parameter.default is not parameter.empty:
            assert mine.default == parameter.default, parameter.name
    defaults = {p.name: 0.1 if p.default is p.empty else p.default for p in expected}
    defaults.pop("max_unorm", None)  # a bound of theirs, of LAMB's and LARS's updates; see DIFFERENT_RULES
    if "8bit" in name:
        defaults.pop("optim_bits", None)  # theirs has the default 32 there, and means 8
    if name.startswith("Paged"):
        defaults.pop("is_paged", None)  # as above
    cls(parameters(), **defaults)
    cls(parameters(), *(defaults[p.name] for p in settings))


@pytest.mark.parametrize("name", ["LAMB", "LARS8bit"])
def test_arguments_of_another_rule_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: there is no argument 'max_unorm'"):
        getattr(q_optim, name)(parameters(), 0.1, max_unorm=0.5)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Muon"])
def test_arguments_are_those_of_torch(name: str) -> None:
    expected = list(inspect.signature(getattr(torch.optim, name).__init__).parameters.values())[2:]
    cls = getattr(q_optim, name)
    own = {p.name: p for p in list(inspect.signature(cls.__init__).parameters.values())[2:]}
    matrices = [nn.Parameter(torch.randn(4, 3))]
    for parameter in expected:
        if parameter.name in own:
            assert own[parameter.name].default == parameter.default, parameter.name
    cls(matrices, **{p.name: p.default for p in expected})
    positional = [p for p in own.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in expected][: len(positional)] == [p.name for p in positional]
    cls(matrices, *(p.default for p in positional))
    cls(matrices, lr=torch.tensor(0.1))
    cls([{"params": matrices, "lr": 0.1}], maximize=True)
    cls([("weight", matrices[0])])


# --- states ---------------------------------------------------------------------------------------------------------------


def values(state: dict[str, Any], key: str, numel: int, i: int | None = None) -> Tensor:
    """What a state of theirs stands for, flat."""
    held = state[key] if i is None else state[key][i]
    if held.dtype != torch.uint8:
        return held.reshape(-1)
    number = key.removeprefix("state")
    absmax = state[f"absmax{number}"] if i is None else state[f"absmax{number}"][i]
    return ops.dequantize_blockwise(held.reshape(-1), absmax, state[f"qmap{number}"], blocksize=256)


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_states_are_taken_over(name: str, tmp_path: Path) -> None:
    optimizer = trained(name)
    own = ours_like(optimizer, name)
    own.load_state_dict(saved(optimizer, tmp_path))
    is_second = algorithm(name) in ONE_SECOND_MOMENT
    for param, (number, state) in zip(own.param_groups[0]["params"], enumerate(optimizer.state.values()), strict=True):
        held = own.state[param]
        assert held["step"] == 3
        in_8_bits = "8bit" in name and param.numel() >= 4096
        assert (state["state1"].dtype == torch.uint8) == in_8_bits
        places = {"state2": ("state1", None)} if is_second else {"state1": ("state1", None), "state2": ("state2", None)}
        if algorithm(name) == "AdEMAMix":
            places = {"state1": ("state1", 0), "state3": ("state1", 1), "state2": ("state2", None)}
        places = {key: place for key, place in places.items() if place[0] in state}
        assert {key for key in held if key.startswith("state")} == set(places), number
        for key, (place, i) in places.items():
            theirs_ = state[place] if i is None else state[place][i]
            assert held[key].dtype == theirs_.dtype and held[key].shape == param.shape
            if not in_8_bits:
                assert torch.equal(held[key], theirs_)
            elif not is_second:
                absmax = state[place.replace("state", "absmax")]
                assert torch.equal(held[key], theirs_)
                assert torch.equal(held[key.replace("state", "absmax")].reshape(-1), absmax if i is None else absmax[i])
            else:  # they hold it in the code book of first moments: it is encoded again
                expected = values(state, place, param.numel(), i)
                found = ops.dequantize_blockwise(
                    held[key].reshape(-1), held["absmax2"].reshape(-1), dynamic_map(signed=False), blocksize=256
                )
                scale = state["absmax1"].repeat_interleave(256)[: param.numel()]
                assert ((found - expected).abs() <= 0.00352 * scale).all()
    assert own.param_groups[0]["lr"] == SETTINGS[algorithm(name)]["lr"]
    assert own.param_groups[0]["weight_decay"] == SETTINGS[algorithm(name)]["weight_decay"]


@pytest.mark.parametrize("name", [name for name in RUNNING if algorithm(name) not in DIFFERENT_RULES])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_training_goes_on_as_theirs(name: str, tmp_path: Path) -> None:
    optimizer = trained(name)
    own = ours_like(optimizer, name)
    own.load_state_dict(saved(optimizer, tmp_path))
    before = [param.detach().clone() for param in own.param_groups[0]["params"]]
    for each in (own, optimizer):
        train(each, range(3, 4))
    for start, mine, expected in zip(before, own.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        moved, wanted = mine.detach() - start, expected.detach() - start
        if algorithm(name) in ONE_SECOND_MOMENT and "8bit" in name and start.numel() >= 4096:
            # States were encoded once more: most updates differ by what that makes of the root, half of its relative error.
            assert ((moved - wanted).abs() <= 0.1 * wanted.abs() + 1e-6).float().mean() > 0.95
        else:
            torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=4 * torch.finfo(torch.float32).eps * start.abs().max().item())


def test_states_that_older_versions_saved() -> None:
    """Before their states were nested in one key more."""
    optimizer = trained("AdamW8bit")
    nested, flat = optimizer.state_dict(), torch.optim.Optimizer.state_dict(optimizer)
    assert "state1" in flat["state"][0] and "state1" not in nested["state"][0]
    first, second = ours_like(optimizer, "AdamW8bit"), ours_like(optimizer, "AdamW8bit")
    first.load_state_dict(nested)
    second.load_state_dict(flat)
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a if key != "step")


def test_paged_and_not_take_over_the_same() -> None:
    optimizer = trained("Adam8bit")
    plain, paged = ours_like(optimizer, "Adam8bit"), ours_like(optimizer, "PagedAdam8bit", paged_budget=0)
    for own in (plain, paged):
        own.load_state_dict(optimizer.state_dict())
        train(own, range(3, 5))
    for a, b in zip(plain.param_groups[0]["params"], paged.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


# --- what doesn't fit -----------------------------------------------------------------------------------------------------

ALIKE = {("Adam", "AdamW"), ("AdamW", "Adam")}  # the same states and settings: nothing tells them apart


@pytest.mark.parametrize("bits", ["", "8bit"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_states_of_another_algorithm_are_refused(name: str, bits: str) -> None:
    optimizer = trained(name + bits, steps=1)
    for other in SETTINGS:
        if other == name or (name, other) in ALIKE:
            continue
        own = ours_like(optimizer, other + bits)
        with pytest.raises(ValueError, match=rf"{other}{bits}.load_state_dict: .* saved by bitsandbytes' .*{name}\b"):
            own.load_state_dict(optimizer.state_dict())
        assert not own.state
        assert own.param_groups[0]["lr"] == 1.0


def test_states_of_torch_are_refused() -> None:
    params = parameters()
    for cls, other in ((torch.optim.AdamW, "AdamW"), (torch.optim.SGD, "SGD"), (torch.optim.Adagrad, "Adagrad")):
        optimizer = cls(params, lr=0.1)
        train(optimizer, range(1))
        own = ours_like(optimizer, other)
        with pytest.raises(ValueError, match=r"load_state_dict: .*(was it saved by|another optimizer)"):
            own.load_state_dict(optimizer.state_dict())
        assert not own.state


def test_states_of_another_precision_and_model_are_refused() -> None:
    optimizer = trained("AdamW8bit")
    with pytest.raises(ValueError, match=r"parameter 0 of shape \[32, 300\].*optim_bits"):
        ours_like(optimizer, "AdamW").load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 of shape \[32, 300\]: .*blocksize"):
        ours_like(optimizer, "AdamW8bit", blocksize=128).load_state_dict(optimizer.state_dict())
    params = parameters()
    with pytest.raises(ValueError, match=r"parameter 0 of shape \[16, 256\]: state1 is torch.uint8 \[32, 300\]"):
        q_optim.AdamW8bit([params[1], params[0], params[2]]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"the saved groups have \[3\] parameters, this optimizer's have \[2\]"):
        q_optim.AdamW8bit(params[:2]).load_state_dict(optimizer.state_dict())
