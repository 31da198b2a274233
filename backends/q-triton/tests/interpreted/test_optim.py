"""Optimizer steps: every rule against float64 and against the CPU's, many tensors a call, what is skipped, every tile."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import RULES
from q_core.reference.optim import RULES as REFERENCE
from q_core.reference.optim import Hyperparameters, Moments
from q_core.samples import optim as samples
from q_core.samples.make import Make
from q_triton import optim, tiles
from q_triton.launch import Launch, recorded
from q_triton.targets import target_of
from q_triton.tiles import Tile, tile

CALLS = list(samples._calls())
NAMES = [f"{call['name']}-{i}" for i, call in enumerate(CALLS)]
SETTINGS = (
    "lr", "beta1", "beta2", "beta3", "alpha", "eps", "weight_decay", "dampening", "nesterov", "trust_coefficient", "step",
)  # fmt: skip
STATES = ("state1", "state2", "state3")
SCALES = ("absmax1", "absmax2", "absmax3")


@pytest.fixture(autouse=True)
def _a_table_is_one_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's time is that of programs, whatever their size."""
    monkeypatch.setattr(tiles, "_tuned", {})
    use(search_table=tile(BLOCK=1 << 15))
    yield
    tiles._source.cache_clear()


def use(**chosen: Tile) -> None:
    """Let these tiles come before all others."""
    tiles.use_tuned(target_of(torch.device("cpu")).name, {kernel: (one,) for kernel, one in chosen.items()})


def settings_of(call: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: call[name] for name in SETTINGS} | changes


def lists_32bit(name: str, beta1: float, sizes: list[int], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    make, kept = Make(seed), RULES[name].names(beta1)
    return {
        "params": [make.normal(size, dtype=dtype) for size in sizes],
        "grads": [make.normal(size, dtype=dtype) for size in sizes],
        **{state: [make.uniform(size) if state in kept else None for size in sizes] if state in kept else [] for state in STATES},
        "skipped": [torch.zeros((), dtype=torch.int64) for _ in sizes],
    }


def lists_8bit(
    name: str, beta1: float, sizes: list[int], blocksize: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    make, kept = Make(seed), RULES[name].names(beta1)
    lists = lists_32bit(name, beta1, sizes, dtype=dtype, seed=seed)
    for state, scales in zip(STATES, SCALES, strict=True):
        held = sizes if state in kept else []
        lists[state] = [make.integers(size, low=0, high=256, dtype=torch.uint8) for size in held]
        lists[scales] = [make.uniform(-(-size // blocksize), low=0.1) for size in held]
    return lists | {"code1": dynamic_map(signed=True), "code2": dynamic_map(signed=False), "blocksize": blocksize}


def launches_of(call: dict[str, Any], step: Any) -> list[Launch]:
    """What a call launches, without running it."""
    found: list[Launch] = []
    with recorded(found.append):
        step(**call)
    return found


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_rules_over_three_steps(call: dict[str, Any]) -> None:
    """In float64, step by step, from the same first states."""
    name, first = call["name"], call["step"]
    lists = lists_32bit(name, call["beta1"], [40, 24])
    wide = [param.double() for param in lists["params"]]
    moments = [Moments(*(lists[state][i].double() if lists[state] else None for state in STATES)) for i in range(2)]
    for step in range(first, first + 3):
        lists["grads"] = [Make(step).normal(param.numel()) for param in lists["params"]]
        settings = settings_of(call, step=step)
        optim.optimizer_step_32bit(name, **lists, **settings)
        for i, grad in enumerate(lists["grads"]):
            wide[i], moments[i] = REFERENCE[name](wide[i], grad.double(), moments[i], Hyperparameters(**settings))
    for i in range(2):
        torch.testing.assert_close(lists["params"][i].double(), wide[i], rtol=2e-6, atol=2e-6)
        for state in RULES[name].names(call["beta1"]):
            torch.testing.assert_close(lists[state][i].double(), getattr(moments[i], state), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_the_cpu_agrees(call: dict[str, Any]) -> None:
    """Codes of both are the same but where a rounding crosses a midpoint."""
    cpu = pytest.importorskip("q_cpu.optim")
    name = call["name"]
    ours = lists_8bit(name, call["beta1"], [700, 64], 256)
    theirs = copy.deepcopy(ours)
    optim.optimizer_step_8bit(name, **ours, **settings_of(call))
    cpu.optimizer_step_8bit(name, **theirs, **settings_of(call))
    for i in range(2):
        torch.testing.assert_close(ours["params"][i], theirs["params"][i], rtol=1e-6, atol=1e-6)
        for state, scales in zip(STATES, SCALES, strict=True):
            if ours[state]:
                steps = (ours[state][i].int() - theirs[state][i].int()).abs()
                assert steps.max() <= 1 and steps.float().mean() < 0.01
                torch.testing.assert_close(ours[scales][i], theirs[scales][i], rtol=1e-6, atol=0)


def test_three_hundred_tensors() -> None:
    """Of every size that counts, the empty among them; those in whole vectors share launches, eight a launch, one dtype each."""
    sizes = [(0, 8, 24, 5, 1032)[i % 5] for i in range(300)]
    settings = dict.fromkeys(SETTINGS, 0.0) | {"lr": 0.5, "nesterov": False, "step": 2}
    lists = lists_32bit("sgd", 0.0, sizes)
    for i in range(0, 300, 2):
        for argument in ("params", "grads"):
            lists[argument][i] = lists[argument][i].bfloat16()
    expected = [param - 0.5 * grad for param, grad in zip(lists["params"], lists["grads"], strict=True)]
    launches = launches_of({"name": "sgd", **lists, **settings}, optim.optimizer_step_32bit)
    assert len(launches) == 60 + 2 * -(-90 // optim.GROUP)
    assert {len(launch.arguments["parameters"]) for launch in launches} == {1, optim.GROUP}
    optim.optimizer_step_32bit("sgd", **lists, **settings)
    for param, value in zip(lists["params"], expected, strict=True):
        torch.testing.assert_close(param, value.to(param.dtype), rtol=2**-8 if param.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_no_tensors_with_elements() -> None:
    for call, step in (
        (lists_32bit("adamw", 0.9, [0, 0]), optim.optimizer_step_32bit),
        (lists_8bit("adamw", 0.9, [0], 64), optim.optimizer_step_8bit),
    ):
        assert launches_of({"name": "adamw", **call, **settings_of(CALLS[1])}, step) == []


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])
@pytest.mark.parametrize("is_8bit", [True, False])
def test_what_is_skipped_stays_and_is_counted(name: str, is_8bit: bool) -> None:
    """An element, a block or a whole tensor; two tensors may share a counter."""
    call = next(call for call in CALLS if call["name"] == name)
    sizes = [200, 64, 72]
    lists = lists_8bit(name, 0.9, sizes, 64) if is_8bit else lists_32bit(name, 0.9, sizes)
    lists["grads"][0][[5, 7, 195]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    lists["grads"][2][70] = torch.inf
    lists["skipped"][0].fill_(100)
    lists["skipped"][2] = lists["skipped"][0]
    before = copy.deepcopy(lists)
    step = optim.optimizer_step_8bit if is_8bit else optim.optimizer_step_32bit
    step(name, **lists, **settings_of(call))
    kept = [torch.ones(size, dtype=torch.bool) for size in sizes]
    if name != "adamw":
        kept[0], kept[2] = ~kept[0], ~kept[2]
    elif is_8bit:
        kept[0][:64] = kept[0][192:] = kept[2][64:] = False
    else:
        kept[0][[5, 7, 195]] = kept[2][70] = False
    assert lists["skipped"][0] == 100 + sum(int((~keep).sum()) for keep in kept)
    assert lists["skipped"][1] == 0
    for i, keep in enumerate(kept):
        assert torch.equal(lists["params"][i] != before["params"][i], keep)
        for state in RULES[name].names(0.9):
            assert torch.equal(lists[state][i][~keep], before[state][i][~keep])


@pytest.mark.parametrize("chosen", optim.OPTIMIZER_8BIT.known(), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_8bit_steps(chosen: Tile, dtype: torch.dtype) -> None:
    """Blocks of every size that a tile is for: the largest, which is a row, and the smallest, of which it has many."""
    cpu = pytest.importorskip("q_cpu.optim")
    use(optimizer_8bit=replace(chosen, up_to=None))
    for blocksize in {32, chosen.blocks["BLOCK"]}:
        size = chosen.blocks["BLOCK"] + 40
        ours = lists_8bit("adamw", 0.9, [size], blocksize, dtype=dtype)
        theirs = copy.deepcopy(ours)
        optim.optimizer_step_8bit("adamw", **ours, **settings_of(CALLS[1]))
        cpu.optimizer_step_8bit("adamw", **theirs, **settings_of(CALLS[1]))
        torch.testing.assert_close(ours["params"][0], theirs["params"][0])
        for state in ("state1", "state2"):
            assert (ours[state][0].int() - theirs[state][0].int()).abs().max() <= 1


@pytest.mark.parametrize("chosen", optim.OPTIMIZER_32BIT.known(), ids=str)
def test_tiles_of_32bit_steps(chosen: Tile) -> None:
    use(optimizer_32bit=chosen)
    lists = lists_32bit("adamw", 0.9, [chosen.blocks["BLOCK"] + 40])
    wide, _ = REFERENCE["adamw"](
        lists["params"][0].double(), lists["grads"][0].double(),
        Moments(lists["state1"][0].double(), lists["state2"][0].double()), Hyperparameters(**settings_of(CALLS[1])),
    )  # fmt: skip
    optim.optimizer_step_32bit("adamw", **lists, **settings_of(CALLS[1]))
    torch.testing.assert_close(lists["params"][0].double(), wide, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chosen", [*optim.TRUST_RATIO.known(), tile(BLOCK=8)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_tiles_of_trust_ratios(chosen: Tile, scale: float) -> None:
    """More programs than one tile has elements, and norms whose squares would vanish or overflow."""
    use(trust_ratio=chosen, optimizer_32bit=tile(BLOCK=32))
    lists = lists_32bit("lars", 0.0, [32 * 20])
    lists["params"][0] *= scale
    before, grad = lists["params"][0].double(), lists["grads"][0].double()
    settings = dict.fromkeys(SETTINGS, 0.0) | {"lr": 1.0, "nesterov": False, "trust_coefficient": 0.5, "step": 3}
    optim.optimizer_step_32bit("lars", **lists, **settings)
    expected = before - 0.5 * before.norm() / grad.norm() * grad
    torch.testing.assert_close(lists["params"][0].double(), expected, rtol=1e-5, atol=1e-6 * scale)


BOOKS: dict[str, Tensor] = {
    "dynamic": dynamic_map(signed=True),
    "even": torch.linspace(-1, 1, 256),
    "that no table serves": torch.cat((torch.linspace(-1, 0, 200), torch.linspace(0, 1, 57)[1:])).sort().values,
    "with entries twice": torch.linspace(-1, 1, 129)[torch.arange(256) // 2],
}


@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_a_table_of_the_book_changes_nothing(book: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What many elements are encoded with, and few: the same codes, of any ascending book."""
    plain = lists_8bit("lion", 0.9, [1000], 64) | {"code1": book}
    by_table = copy.deepcopy(plain)
    settings = settings_of(next(call for call in CALLS if call["name"] == "lion"))
    optim.optimizer_step_8bit("lion", **plain, **settings)
    monkeypatch.setattr(optim, "TABLE_FROM", 0)
    optim.optimizer_step_8bit("lion", **by_table, **settings)
    assert torch.equal(plain["state1"][0], by_table["state1"][0])
    assert torch.equal(plain["absmax1"][0], by_table["absmax1"][0])


@pytest.mark.parametrize("name", ["adamw", "adam", "ademamix", "rmsprop", "adagrad"])
@pytest.mark.parametrize("is_8bit", [True, False])
def test_without_eps(name: str, is_8bit: bool) -> None:
    """What has no gradient and no state doesn't move; the root of a subnormal second moment isn't taken for 0."""
    call = next(call for call in CALLS if call["name"] == name)
    lists = lists_8bit(name, call["beta1"], [64], 32) if is_8bit else lists_32bit(name, call["beta1"], [64])
    for state in RULES[name].names(call["beta1"]):
        if is_8bit:
            lists[state][0][:] = (127, 0)[state == "state2"]
            lists[SCALES[STATES.index(state)]][0][:] = 0.0
        else:
            lists[state][0][:] = 0.0
    lists["grads"][0][:32] = 0.0
    lists["grads"][0][32:] = 1e-20
    before = lists["params"][0].clone()
    step = optim.optimizer_step_8bit if is_8bit else optim.optimizer_step_32bit
    step(name, **lists, **settings_of(call, eps=0.0, weight_decay=0.0))
    assert torch.equal(lists["params"][0][:32], before[:32])
    moved = (lists["params"][0][32:] - before[32:]).abs()
    assert moved.isfinite().all() and moved.min() > 0.0


def test_strided_gradients() -> None:
    lists = lists_32bit("sgd", 0.0, [64])
    strided = torch.zeros(64, 2)
    strided[:, 0] = lists["grads"][0]
    expected = lists["params"][0] - lists["grads"][0]
    settings = dict.fromkeys(SETTINGS, 0.0) | {"lr": 1.0, "nesterov": False, "step": 2}
    optim.optimizer_step_32bit("sgd", **lists | {"grads": [strided[:, 0]]}, **settings)
    assert torch.equal(lists["params"][0], expected)


def test_declined_scales() -> None:
    lists = lists_8bit("lion", 0.9, [128], 32)
    assert optim._accepts_8bit(lists["params"], lists["absmax1"], [], []) is None
    strided = torch.zeros(4, 2)[:, 0]
    assert optim._accepts_8bit(lists["params"], [strided], [], []) == "absmax1[0] is not contiguous"
