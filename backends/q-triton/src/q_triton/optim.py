"""Optimizer steps. Contracts: :mod:`q_core.ops.optim`.

A parameter of many elements has a launch of its own. Small ones, of which a model has hundreds, share launches, :data:`GROUP` at a time:
what a launch costs the host is more than the device takes for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q_core.backend import impl
from q_core.optimizers import ALL_STATES, WHOLE_TENSOR_RULES
from q_triton.kernels.optim_8bit import optimizer_8bit_kernel
from q_triton.kernels.optim_32bit import optimizer_32bit_kernel
from q_triton.kernels.trust_ratio import trust_ratio_kernel
from q_triton.launch import launch
from q_triton.quantize import TABLE_FROM, search_table
from q_triton.shapes import ceil_div
from q_triton.tiles import Tile, Tiles, tile

# A thread has 16 elements. Blocks of up to 512 are one warp's, or parts of one: nothing is to be waited for then.
OPTIMIZER_8BIT = Tiles(
    "optimizer_8bit",
    (
        tile(BLOCK=512, warps=1, up_to=512),
        tile(BLOCK=1024, warps=2, up_to=1024),
        tile(BLOCK=2048, warps=4, up_to=2048),
        tile(BLOCK=4096, warps=8),
    ),
    size="elements of a block",
)
OPTIMIZER_32BIT = Tiles("optimizer_32bit", (tile(BLOCK=1024, warps=8),))
TRUST_RATIO = Tiles("trust_ratio", (tile(BLOCK=2048, warps=8),))

GROUP = 8
"""Parameters of a launch that several share."""
LARGE = 1 << 22
"""Elements from which a parameter is a launch's only one: the device then takes longer than the launch."""
UNIT = 8
"""A parameter with this many elements, or a multiple, is read in whole vectors."""
TINY_EPS = 1e-12
"""An eps below this doesn't drown the root of a subnormal number, which is up to 1.1e-19."""


class Settings(NamedTuple):
    """What the kernels of :mod:`q_triton.kernels.optim_rules` are given of the settings, computed in double precision."""

    lr: float
    decay: float
    weight_decay: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    beta3: float
    rest3: float
    undamped: float
    alpha: float
    eps: float
    trust_coefficient: float
    correction: float
    root_correction: float


@dataclass(frozen=True, slots=True)
class _Rule:
    """A step's rule: its settings, and what kernels are compiled for."""

    name: str
    settings: Settings
    nesterov: bool
    step: int

    @property
    def constants(self) -> dict[str, Any]:
        is_first = self.step == 1 and self.name in ("sgd", "lars")
        momentum = self.settings.beta1 != 0.0
        tiny = self.settings.eps < TINY_EPS
        return {"RULE": self.name, "MOMENTUM": momentum, "NESTEROV": self.nesterov, "FIRST": is_first, "TINY_EPS": tiny}


def _rule(
    name: str, lr: float, beta1: float, beta2: float, beta3: float, alpha: float, eps: float, weight_decay: float,
    dampening: float, nesterov: bool, trust_coefficient: float, step: int,
) -> _Rule:  # fmt: skip
    settings = Settings(
        lr, 1 - lr * weight_decay, weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3, 1 - dampening, alpha, eps,
        trust_coefficient, 1 / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step),
    )  # fmt: skip
    return _Rule(name, settings, nesterov, step)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Tensors that one launch updates.

    Attributes:
        members: their places in the op's lists; the last again and again, to :data:`GROUP`, where there are several.
        tensors: how many they are.
        numels: elements of each; 0 of those that fill up.
    """

    members: tuple[int, ...]
    tensors: int
    numels: tuple[int, ...]

    @property
    def unit(self) -> int:
        return math.gcd(UNIT, *self.numels)

    def of(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Those of a list, ``None`` if it's empty."""
        return tuple(tensors[i] for i in self.members) if tensors else None

    def starts(self, block: int) -> tuple[int, ...]:
        """The first program of each, and how many programs there are in all."""
        starts = [0]
        for numel in self.numels:
            starts.append(starts[-1] + ceil_div(numel, block))
        return tuple(starts)


def _batches(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Iterator[_Batch]:
    """All tensors that have elements, the small ones of a dtype together if they are read in whole vectors.

    States and scales are an optimizer's own and begin where an allocation does; were one elsewhere, another kernel would be compiled.
    """
    waiting: dict[torch.dtype, list[int]] = {}
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        numel = param.numel()
        if not numel:
            continue
        if numel >= LARGE or numel % UNIT or (param.data_ptr() | grad.data_ptr()) % 16:
            yield _Batch((i,), 1, (numel,))
            continue
        together = waiting.setdefault(param.dtype, [])
        together.append(i)
        if len(together) == GROUP:
            yield _together(params, waiting.pop(param.dtype))
    for together in waiting.values():
        yield _together(params, together)


def _together(params: Sequence[Tensor], together: list[int]) -> _Batch:
    # One or GROUP, so that kernels are compiled for no other number.
    filling = [together[-1]] * (GROUP - len(together)) if len(together) > 1 else []
    numels = (*(params[i].numel() for i in together), *(0 for _ in filling))
    return _Batch((*together, *filling), len(together), numels)


def _step(kernel: Any, chosen: Tile, rule: _Rule, batch: _Batch, skipped: Sequence[Tensor], **arguments: Any) -> None:
    """Update a batch; for lamb and lars after a pass for the norms."""
    *starts, programs = batch.starts(chosen.blocks["BLOCK"])
    counters, unit = batch.of(skipped), batch.unit
    sums = ratios = None
    common = {
        **arguments, **rule.constants, "h": rule.settings, "starts": tuple(starts), "UNIT": unit,
        "units": tuple(numel // unit for numel in batch.numels),
    }  # fmt: skip
    if rule.name in WHOLE_TENSOR_RULES:
        device = arguments["parameters"][0].device
        sums = torch.empty((5, programs), dtype=torch.float32, device=device)
        ratios = torch.empty((len(batch.members), 2), dtype=torch.float32, device=device)
        launch(kernel, (programs,), chosen, sums=sums, ratios=None, skipped=None, **common)
        launch(
            trust_ratio_kernel, (batch.tensors,), TRUST_RATIO.on(device),
            sums=sums, ratios=ratios, skipped=counters, starts=tuple(starts), ends=(*starts[1:], programs), numels=batch.numels,
            places=tuple(range(len(starts))), programs=programs, h=rule.settings, RULE=rule.name,
        )  # fmt: skip
        counters = None
    launch(kernel, (programs,), chosen, sums=None, ratios=ratios, skipped=counters, **common)


def _accepts_32bit(params: Sequence[Tensor]) -> str | None:
    devices = {param.device for param in params}
    return f"params on {', '.join(sorted(map(str, devices)))}, only on one device" if len(devices) > 1 else None


def _accepts_8bit(
    params: Sequence[Tensor], absmax1: Sequence[Tensor], absmax2: Sequence[Tensor], absmax3: Sequence[Tensor]
) -> str | None:
    """All else that is written to is contiguous by the contract."""
    for argument, tensors in (("absmax1", absmax1), ("absmax2", absmax2), ("absmax3", absmax3)):
        for i, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                return f"{argument}[{i}] is not contiguous"
    return _accepts_32bit(params)


@impl(accepts=_accepts_8bit)
def optimizer_step_8bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    state3: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    absmax3: Sequence[Tensor],
    skipped: Sequence[Tensor],
    code1: Tensor,
    code2: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    trust_coefficient: float,
    step: int,
    blocksize: int,
) -> None:
    """Update parameters with optimizer states held in 8 bits."""
    rule = _rule(name, lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step)
    chosen = OPTIMIZER_8BIT.on(params[0].device, blocksize)
    books = {"book1": code1.contiguous(), "book2": code2.contiguous()}
    is_worth_tables = sum(param.numel() for param in params) >= TABLE_FROM
    tables = {
        "table1": search_table(books["book1"]) if is_worth_tables and state1 else None,
        "table2": search_table(books["book2"]) if is_worth_tables and state2 else None,
    }
    lists = (params, [grad.contiguous() for grad in grads], state1, state2, state3, absmax1, absmax2, absmax3)
    names = ("parameters", "grads", "codes1", "codes2", "codes3", "absmax1", "absmax2", "absmax3")
    for batch in _batches(params, lists[1]):
        tensors = {argument: batch.of(tensors) for argument, tensors in zip(names, lists, strict=True)}
        _step(
            optimizer_8bit_kernel, chosen, rule, batch, skipped,
            **tensors, **books, **tables, BLOCKSIZE=blocksize,
        )  # fmt: skip


@impl(accepts=_accepts_32bit)
def optimizer_step_32bit(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    state3: Sequence[Tensor],
    skipped: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    trust_coefficient: float,
    step: int,
) -> None:
    """Update parameters with optimizer states held in float32."""
    rule = _rule(name, lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, nesterov, trust_coefficient, step)
    chosen = OPTIMIZER_32BIT.on(params[0].device)
    lists = (params, [grad.contiguous() for grad in grads], state1, state2, state3)
    for batch in _batches(params, lists[1]):
        tensors = {
            argument: batch.of(tensors) for argument, tensors in zip(("parameters", "grads", *ALL_STATES), lists, strict=True)
        }
        _step(optimizer_32bit_kernel, chosen, rule, batch, skipped, **tensors)
