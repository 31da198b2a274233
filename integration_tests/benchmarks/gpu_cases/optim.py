"""Optimizer steps beside torch's fused AdamW and bitsandbytes' 8-bit ones: ops held against copying, and whole optimizers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import q_optim
from benchmarks.case import Call, Case, Target, Work
from benchmarks.gpu_cases.sizes import BITSANDBYTES, Sizes, agrees
from benchmarks.optimizer_settings import SETTINGS
from q_core import ops
from q_core.formats.codebooks import dynamic_map
from q_core.optimizers import RULES
from q_core.reference import optim as reference

BLOCKSIZE = 256
GATE, STRETCH = Target(fraction=0.80, ratios={"bitsandbytes": 1.0}), Target(fraction=0.88)
CHECKED = 2**16
"""Elements of a step that is compared with float64's."""


def cases(sizes: Sizes) -> Iterator[Case]:
    for bits in (8, 32):
        for dtype in (torch.bfloat16, torch.float32):
            yield _step(sizes, "adamw", bits, dtype, gated=bits == 8)
    for name in SETTINGS:
        if name != "adamw":
            yield _step(sizes, name, 8, torch.bfloat16)
    yield from _whole_optimizers(sizes)


def _tensors(sizes: Sizes, name: str, bits: int, dtype: torch.dtype, elements: int) -> dict[str, list[Tensor]]:
    """The lists that the op takes, of one parameter in the middle of a training."""
    made = {"params": [sizes.normal(elements, dtype=dtype)], "grads": [sizes.normal(elements, dtype=dtype, scale=1e-3)]}
    for state in RULES[name].names(SETTINGS[name].get("beta1", 0.0)):
        value = sizes.normal(elements, dtype=torch.float32, scale=1e-3)
        value = value.square_() if state == "state2" else value
        if bits == 32:
            made[state] = [value]
        else:
            book = ops.quantize_blockwise(value, _book(sizes, state), blocksize=BLOCKSIZE)
            made[state], made[state.replace("state", "absmax")] = ([each] for each in book)
    return made


def _book(sizes: Sizes, state: str) -> Tensor:
    return dynamic_map(signed=state != "state2", device=sizes.device)


def _step(sizes: Sizes, name: str, bits: int, dtype: torch.dtype, *, gated: bool = False) -> Case:
    op = ops.optimizer_step_8bit if bits == 8 else ops.optimizer_step_32bit
    lists = _tensors(sizes, name, bits, dtype, sizes.parameters)
    settings = {"lr": 1e-3, "step": 10, **SETTINGS[name]}
    bytes_moved = sum(held.nbytes * (1 if key == "grads" else 2) for key, (held,) in lists.items())
    peers: dict[str, Call] = {}
    if name == "adamw":
        peers["torch fused AdamW"] = _stepper(sizes, torch.optim.AdamW, [sizes.parameters], dtype, fused=True)
    if bits == 8 and name in _THEIRS and BITSANDBYTES:
        peers["bitsandbytes"] = _stepper(sizes, getattr(BITSANDBYTES.optim, _THEIRS[name]), [sizes.parameters], dtype)

    some = {
        key: [held[0][: CHECKED if held[0].numel() == sizes.parameters else CHECKED // BLOCKSIZE]] for key, held in lists.items()
    }

    def got() -> Tensor:
        mine = copy.deepcopy(some)
        op(name, **mine, **settings)
        return mine["params"][0]

    def exact() -> Tensor:
        return _in_float64(sizes, name, bits, some, settings)

    return Case(
        f"optimizer_step_{bits}bit [{name}]", f"{sizes.parameters / 1e6:.4g} M", str(dtype).removeprefix("torch."),
        lambda _: op(name, **lists, **settings), peers, sets=1, work=Work("copy", bytes_moved),
        target=GATE if gated else Target(), stretch=STRETCH if gated else Target(),
        check=agrees(got, exact, dtype), launched=tuple(peers),  # which count their steps on the host
    )  # fmt: skip


def _in_float64(sizes: Sizes, name: str, bits: int, lists: dict[str, list[Tensor]], settings: dict[str, Any]) -> Tensor:
    """The parameter after the reference's step."""
    states = ("state1", "state2", "state3", *(("absmax1", "absmax2", "absmax3") if bits == 8 else ()))
    kept = {key: copy.deepcopy(lists.get(key, [])) for key in ("params", "grads", *states)}
    kept |= {key: [held.double() for held in kept[key]] for key in ("params", "grads", *(states if bits == 32 else ()))}
    neutral = dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps", "weight_decay", "dampening", "trust_coefficient"), 0.0)
    books = {"code1": _book(sizes, "state1"), "code2": _book(sizes, "state2"), "blocksize": BLOCKSIZE} if bits == 8 else {}
    step = reference.optimizer_step_8bit if bits == 8 else reference.optimizer_step_32bit
    step(name=name, skipped=[], nesterov=False, **kept, **books, **{**neutral, **settings})
    return kept["params"][0]


_THEIRS = {"adam": "Adam8bit", "adamw": "AdamW8bit", "ademamix": "AdEMAMix8bit", "lion": "Lion8bit"}


def _whole_optimizers(sizes: Sizes) -> Iterator[Case]:
    """A class's ``step`` on one tensor, and on 200 of mixed size as a model has: what its bookkeeping costs is in it."""
    mixed = [(4096, 600_000, 150_000, 150_000, 600_000, 1_500_000, 4096)[i % 7] for i in range(200)]
    mixed = [max(1, size * sizes.parameters // sum(mixed)) for size in mixed]
    for shape, elements in {"one tensor": [sizes.parameters], "200 tensors": mixed}.items():
        peers = {"torch fused AdamW": _stepper(sizes, torch.optim.AdamW, elements, torch.bfloat16, fused=True)}
        if BITSANDBYTES:
            peers["bitsandbytes"] = _stepper(sizes, BITSANDBYTES.optim.AdamW8bit, elements, torch.bfloat16)
        yield Case(
            "AdamW8bit.step", f"{sizes.parameters / 1e6:.4g} M in {shape}", "bfloat16",
            _stepper(sizes, q_optim.AdamW8bit, elements, torch.bfloat16), peers,
            target=Target(ratios={"bitsandbytes": 1.0}), launched=("ours", *peers),
        )  # fmt: skip


def _stepper(sizes: Sizes, optimizer: Any, elements: list[int], dtype: torch.dtype, **options: Any) -> Call:
    parameters = [torch.nn.Parameter(sizes.normal(size, dtype=dtype)) for size in elements]
    for parameter in parameters:
        parameter.grad = sizes.normal(parameter.numel(), dtype=dtype, scale=1e-3)
    made = optimizer(parameters, lr=1e-3, **options)
    return lambda _: made.step()
