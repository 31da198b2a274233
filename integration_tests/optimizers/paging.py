"""Training whose states are four times what memory they may take, beside the same training unpaged."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from q_optim import AdamW, PagedAdamW, state_bytes

STEPS = 8


@dataclass(frozen=True, slots=True)
class Paging:
    """A paged run beside an unpaged one.

    Attributes:
        bits: precision of the states.
        states: their bytes.
        budget: bytes of memory that they may take.
        equal: parameters and states are the same bits in the end.
        step_seconds: the optimizer's step, unpaged, the median.
        paged_step_seconds: paged.
        training_seconds: a step with its forward and backward on 256 tokens, unpaged.
        paged_training_seconds: paged.
    """

    bits: int
    states: int
    budget: int
    equal: bool
    step_seconds: float
    paged_step_seconds: float
    training_seconds: float
    paged_training_seconds: float


def measure(bits: int, directory: Path, *, layers: int = 12, width: int = 2048, tokens: int = 256) -> Paging:
    """Train both, on the same data."""
    runs = []
    budget = 0
    for paged in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        if paged:
            optimizer: AdamW = PagedAdamW(model.parameters(), optim_bits=bits, paged_budget=budget, paged_directory=directory)
        else:
            optimizer = AdamW(model.parameters(), optim_bits=bits)
        steps, whole = [], []
        for _ in range(STEPS):
            start = time.perf_counter()
            model(torch.randn(tokens, width)).square().mean().backward()
            middle = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            optimizer.zero_grad(set_to_none=False)
            steps.append(end - middle)
            whole.append(end - start)
        budget = state_bytes(optimizer) // 4
        runs.append((model, optimizer, statistics.median(steps), statistics.median(whole)))
    (model, optimizer, step, training), (paged_model, paged_optimizer, paged_step, paged_training) = runs
    equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), paged_model.parameters(), strict=True)) and all(
        torch.equal(optimizer.state[a][key], paged_optimizer.state[b][key])
        for a, b in zip(model.parameters(), paged_model.parameters(), strict=True)
        for key in optimizer.state[a]
        if key != "step"
    )
    return Paging(bits, state_bytes(optimizer), budget, equal, step, paged_step, training, paged_training)
