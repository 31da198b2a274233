"""Bytes of states on a model of 100 million parameters, and what the process grows by."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from q_optim import AdamW, state_bytes

LAYERS, WIDTH = 24, 2048
"""24 × 2048² parameters and the biases: 100.7 million."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one step left behind.

    Attributes:
        bits: precision of the states.
        parameters: how many there are.
        states: bytes of the states' tensors.
        process: bytes that the process grew by.
    """

    bits: int
    parameters: int
    states: int
    process: int

    @property
    def bytes_a_parameter(self) -> float:
        return self.states / self.parameters


def measure(bits: int, *, layers: int = LAYERS, width: int = WIDTH) -> Memory:
    """Make a model, give it gradients, and take one step."""
    model = nn.Sequential(*(nn.Linear(width, width, dtype=torch.bfloat16) for _ in range(layers)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = AdamW(model.parameters(), optim_bits=bits)
    gc.collect()
    before = psutil.Process().memory_info().rss
    optimizer.step()
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    return Memory(bits, sum(parameter.numel() for parameter in model.parameters()), state_bytes(optimizer), grown)
