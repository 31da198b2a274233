"""Optimizer steps on 16.8 M parameters, beside torch's fused optimizers and bitsandbytes' 8-bit ones: ops, and whole optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes.optim as peer
import torch
from torch import Tensor

import q_optim
from benchmarks.case import Call, Case, Target
from benchmarks.inputs import normal
from benchmarks.optimizer_settings import SETTINGS
from q_core import ops
from q_core.optimizers import RULES

ELEMENTS = 4096 * 4096
BLOCKSIZE = 256
BYTES = {"float32": 4, "bfloat16": 2}


def cases() -> Iterator[Case]:
    gradient = normal(ELEMENTS, scale=1e-3)
    for name in SETTINGS:
        peers = {f"bitsandbytes {name}": _stepper(their, [ELEMENTS]) for their in [_theirs(name)] if their is not None}
        if name == "adamw":
            fused = {"torch fused AdamW": _stepper(torch.optim.AdamW, [ELEMENTS], fused=True)}
            target = Target(ratio=1 / 1.1, ratio_of_all=1 / 0.75, peers=("torch fused AdamW",))
        else:
            fused = {"our adamw": _ours("adamw", gradient, bits=8)}
            target = Target(ratio=1 / 1.3, peers=("our adamw",))
        yield Case(
            f"optimizer_step_8bit [{name}]", "16.8 M", "float32", _ours(name, gradient, bits=8), {**fused, **peers}, target=target
        )
    yield Case(
        "optimizer_step_32bit [adamw]", "16.8 M", "float32", _ours("adamw", gradient, bits=32),
        {"torch fused AdamW": _stepper(torch.optim.AdamW, [ELEMENTS], fused=True)},
    )  # fmt: skip

    yield from _whole_optimizers()


def _whole_optimizers() -> Iterator[Case]:
    """A class's ``step`` on one tensor, and on 200 of mixed size as a model has: what its bookkeeping costs is in it."""
    for shape, sizes in {"16.8 M": [ELEMENTS], "16.8 M in 200 tensors": _mixed_sizes()}.items():
        yield Case(
            "AdamW8bit.step", shape, "float32", _stepper(q_optim.AdamW8bit, sizes),
            {
                "torch fused AdamW": _stepper(torch.optim.AdamW, sizes, fused=True),
                "bitsandbytes AdamW8bit": _stepper(peer.AdamW8bit, sizes),
            },
            target=Target(ratio=1 / 1.1, ratio_of_all=1 / 0.75, peers=("torch fused AdamW",)),
        )  # fmt: skip


def _mixed_sizes() -> list[int]:
    """200 tensors like a decoder's: in every seven, two norms and five matrices of three sizes; as many elements as the one tensor."""
    sizes = [(4096, 600_000, 150_000, 150_000, 600_000, 1_500_000, 4096)[i % 7] for i in range(200)]
    return [size * ELEMENTS // sum(sizes) for size in sizes]


def _stepper(optimizer: type[torch.optim.Optimizer], sizes: list[int], **options: Any) -> Call:
    parameters = [torch.nn.Parameter(normal(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = normal(parameter.numel(), scale=1e-3)
    made = optimizer(parameters, lr=1e-3, **options)  # type: ignore[call-arg]  # the base class has no lr
    return lambda _: made.step()


def _ours(name: str, gradient: Tensor, *, bits: int) -> Call:
    parameter = normal(gradient.numel())
    states: dict[str, list[Tensor]] = {}
    for state in RULES[name].names(SETTINGS[name].get("beta1", 0.0)):
        if bits == 32:
            states[state] = [torch.zeros_like(gradient)]
        else:
            codes, absmax = ops.quantize_blockwise(torch.zeros_like(gradient), blocksize=BLOCKSIZE)
            states[state], states[state.replace("state", "absmax")] = [codes], [absmax]
    step = ops.optimizer_step_8bit if bits == 8 else ops.optimizer_step_32bit
    taken = 0

    def call(_: int) -> None:
        nonlocal taken
        taken += 1
        step(name, [parameter], [gradient], **states, lr=1e-3, step=taken, **SETTINGS[name])

    return call


def _theirs(name: str) -> type[torch.optim.Optimizer] | None:
    names = {"adam": "Adam8bit", "adamw": "AdamW8bit", "ademamix": "AdEMAMix8bit", "lion": "Lion8bit"}
    return getattr(peer, names[name]) if name in names else None
