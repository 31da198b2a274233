"""Every optimizer rule against torch's own optimizer, or against the paper's formulas written out in numpy, over many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from q_core import ops, use_backends
from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import RULES

STEPS = 40
Array = np.ndarray


def gradients(numel: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(numel, generator=generator) for _ in range(STEPS)]


def start(numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1))


def run_32bit(name: str, settings: dict[str, Any], numel: int = 60) -> Tensor:
    p = start(numel)
    kept = RULES[name].names(settings.get("beta1", 0.0))
    states = {state: [torch.zeros(numel)] for state in kept}
    with use_backends("reference"):
        for step, g in enumerate(gradients(numel), 1):
            ops.optimizer_step_32bit(name, [p], [g], step=step, **states, **settings)
    return p


Adam = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
adam = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
TORCH: list[tuple[str, type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = [
    ("adamw", torch.optim.AdamW, Adam, adam),
    ("adam", torch.optim.Adam, Adam, adam),
    ("sgd", torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-2, "weight_decay": 0.1}),
    ("sgd", torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.2}, {"lr": 1e-2, "beta1": 0.9, "dampening": 0.2}),
    ("sgd", torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}, {"lr": 1e-2, "beta1": 0.9, "nesterov": True}),
    ("rmsprop", torch.optim.RMSprop, {"lr": 1e-2, "alpha": 0.95, "weight_decay": 0.1},
     {"lr": 1e-2, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}),
    ("rmsprop", torch.optim.RMSprop, {"lr": 1e-2, "alpha": 0.95, "momentum": 0.8}, {"lr": 1e-2, "beta2": 0.95, "eps": 1e-8, "beta1": 0.8}),
    ("adagrad", torch.optim.Adagrad, {"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "peer", "theirs", "ours"), TORCH)
def test_as_torch(name: str, peer: type[torch.optim.Optimizer], theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(start(60).double())
    optimizer = peer([parameter], **theirs)
    for g in gradients(60):
        parameter.grad = g.double()
        optimizer.step()
    torch.testing.assert_close(run_32bit(name, ours), parameter.detach().float(), rtol=1e-5, atol=1e-5)


def lion(p: Array, g: Array, s: dict[str, Array], t: int) -> Array:
    c = 0.9 * s["m"] + 0.1 * g
    s["m"] = 0.95 * s["m"] + 0.05 * g
    return p - 1e-2 * 0.1 * p - 1e-2 * np.sign(c)


def ademamix(p: Array, g: Array, s: dict[str, Array], t: int) -> Array:
    s["m"] = 0.9 * s["m"] + 0.1 * g
    s["n"] = 0.999 * s["n"] + 0.001 * g
    s["v"] = 0.95 * s["v"] + 0.05 * g * g
    m, v = s["m"] / (1 - 0.9**t), s["v"] / (1 - 0.95**t)
    return p - 1e-2 * ((m + 5 * s["n"]) / (np.sqrt(v) + 1e-6) + 0.1 * p)


def lamb(p: Array, g: Array, s: dict[str, Array], t: int) -> Array:
    s["m"] = 0.9 * s["m"] + 0.1 * g
    s["v"] = 0.95 * s["v"] + 0.05 * g * g
    u = s["m"] / (1 - 0.9**t) / (np.sqrt(s["v"] / (1 - 0.95**t)) + 1e-6) + 0.1 * p
    return p - 1e-2 * np.linalg.norm(p) / np.linalg.norm(u) * u


def lars(p: Array, g: Array, s: dict[str, Array], t: int) -> Array:
    ratio = 0.02 * np.linalg.norm(p) / (np.linalg.norm(g) + 0.1 * np.linalg.norm(p) + 1e-6)
    g = ratio * (g + 0.1 * p)
    s["m"] = g if t == 1 else 0.9 * s["m"] + g
    return p - 0.5 * s["m"]


PAPERS: list[tuple[Callable[..., Array], dict[str, Any]]] = [
    (lion, {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}),
    (ademamix, adam | {"beta3": 0.999, "alpha": 5.0}),
    (lamb, adam),
    (lars, {"lr": 0.5, "beta1": 0.9, "eps": 1e-6, "weight_decay": 0.1, "trust_coefficient": 0.02}),
]


@pytest.mark.parametrize(("formula", "settings"), PAPERS)
def test_as_the_paper(formula: Callable[..., Array], settings: dict[str, Any]) -> None:
    p = start(60).double().numpy()
    states = {name: np.zeros(60) for name in "mnv"}
    for t, g in enumerate(gradients(60), 1):
        p = formula(p, g.double().numpy(), states, t)
    np.testing.assert_allclose(run_32bit(formula.__name__, settings).numpy(), p, rtol=1e-5, atol=1e-5)


def test_every_rule_is_tested_here() -> None:
    assert {name for name, *_ in TORCH} | {formula.__name__ for formula, _ in PAPERS} == set(RULES)


def states_8bit(name: str, beta1: float, numel: int) -> dict[str, list[Tensor]]:
    states: dict[str, list[Tensor]] = {}
    for state in RULES[name].names(beta1):
        codes, absmax = ops.quantize_blockwise(torch.zeros(numel), dynamic_map(signed=state != "state2"))
        states |= {state: [codes], state.replace("state", "absmax"): [absmax]}
    return states


SETTINGS = {name: ours for name, _, _, ours in TORCH} | {formula.__name__: s for formula, s in PAPERS}


@pytest.mark.parametrize("name", RULES)
def test_8bit_states_follow_32bit_ones(name: str) -> None:
    """With gradients of one sign and size an element, block quantization is a small relative error, and the paths stay together."""
    numel, settings = 600, SETTINGS[name]
    exact = start(numel)
    ours = exact.clone()
    states = states_8bit(name, settings.get("beta1", 0.0), numel)
    whole = {state: [torch.zeros(numel)] for state in RULES[name].names(settings.get("beta1", 0.0))}
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(numel, generator=generator).sign()
    with use_backends("reference"):
        for step in range(1, STEPS + 1):
            g = direction * (1 + 0.1 * torch.rand(numel, generator=generator))
            ops.optimizer_step_8bit(name, [ours], [g], step=step, **states, **settings)
            ops.optimizer_step_32bit(name, [exact], [g], step=step, **whole, **settings)
    moved = (exact - start(numel)).abs().mean()
    assert moved > 0
    assert (ours - exact).abs().mean() < 0.02 * moved


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bits", [8, 32])
def test_no_gradient_no_movement(name: str, bits: int) -> None:
    settings = SETTINGS[name] | {"weight_decay": 0.0}
    settings = settings | ({"eps": 0.0} if "eps" in settings else {})
    p = start(600)
    before = p.clone()
    g = torch.zeros(600)
    g[:50] = 1.0
    kept = RULES[name].names(settings.get("beta1", 0.0))
    states = states_8bit(name, settings.get("beta1", 0.0), 600) if bits == 8 else {s: [torch.zeros(600)] for s in kept}
    step_function = ops.optimizer_step_8bit if bits == 8 else ops.optimizer_step_32bit
    with use_backends("reference"):
        for step in range(1, 6):
            step_function(name, [p], [g], step=step, **states, **settings)
    assert torch.equal(p[50:], before[50:])
    assert (p[:50] != before[:50]).all()


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_non_finite_gradient_leaves_the_whole_tensor_of_a_trust_ratio_rule(name: str, bits: int) -> None:
    settings = SETTINGS[name]
    p, g = start(600), torch.ones(600)
    g[7] = float("nan")
    kept = RULES[name].names(settings["beta1"])
    states = states_8bit(name, settings["beta1"], 600) if bits == 8 else {s: [torch.zeros(600)] for s in kept}
    before = {state: tensors[0].clone() for state, tensors in states.items()}
    step_function = ops.optimizer_step_8bit if bits == 8 else ops.optimizer_step_32bit
    with use_backends("reference"):
        step_function(name, [p], [g], step=2, **states, **settings)
    assert torch.equal(p, start(600))
    assert all(torch.equal(states[state][0], tensor) for state, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adamw", {"alpha": 5.0}, "alpha is 5.0, expected 0, since 'adamw' doesn't use it"),
        ("lion", {"eps": 1e-8}, "eps is 1e-08, expected 0, since 'lion' doesn't use it"),
        ("sgd", {"beta1": 0.0, "nesterov": True}, "nesterov is True, expected False without a momentum"),
        ("adamw", {"state3": [torch.zeros(60)]}, "state3 has 1 tensors, expected none: the rule has state1, state2"),
        ("sgd", {"beta1": 0.9}, "state1 has 0 tensors, expected 1"),
    ],
)
def test_settings_and_states_that_a_rule_does_not_have_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"lr": 0.1, "step": 1} | (
        {"state1": [torch.zeros(60)], "state2": [torch.zeros(60)]} if name == "adamw" else {}
    )
    if name == "lion":
        settings["state1"] = [torch.zeros(60)]
    with pytest.raises(ValueError, match=message):
        ops.optimizer_step_32bit(name, [start(60)], [start(60)], **(settings | change))
