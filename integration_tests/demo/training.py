"""Training from scratch with two optimizers, and fine-tuning of adapters: one loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

from demo.settings import Phase

WARMUP_SHARE = 0.05
FINAL_SHARE = 0.1
"""The final loss is the mean over this share of the steps: one batch alone is noise."""

OPTIMIZER_SHARE = 1.2
"""A whole step's time over its forward and backward alone."""


def new_model(config: LlamaConfig, *, seed: int) -> LlamaForCausalLM:
    """A float32 model of random weights, on the CPU: the same for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def train(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor], phase: Phase, *, autocast: bool, title: str
) -> float:
    """Train on every batch, under a cosine schedule.

    Args:
        model: mutated; left in evaluation mode.
        optimizer: over the parameters that are to change.
        batches: token windows, int64 [batch, length].
        phase: number of steps.
        autocast: compute in bfloat16.
        title: of the progress bar.

    Returns:
        The final loss, nats a token.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP_SHARE * phase.steps) + 1, phase.steps)
    losses: list[float] = []
    model.train()
    with tqdm(batches, desc=title, total=phase.steps, unit="step") as progress:
        for ids in progress:
            loss = _loss(model, ids, autocast=autocast)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    final = losses[-max(1, int(FINAL_SHARE * phase.steps)) :]
    return sum(final) / len(final)


@dataclass(frozen=True, slots=True)
class Pace:
    """How a model trains fastest on this machine, and seconds a step takes so."""

    autocast: bool
    seconds: float

    def fit(self, phase: Phase, seconds: float) -> Phase:
        """The phase, shortened to what the seconds allow."""
        return replace(phase, steps=max(1, min(phase.steps, int(seconds / self.seconds))))


def measure_pace(model: PreTrainedModel, ids: Tensor) -> Pace:
    """Try a few steps with and without bfloat16 autocast: a processor without instructions for it is slower with it.

    Args:
        model: its gradients are reset, nothing else changes.
        ids: a batch, int64 [batch, length].
    """
    paces = []
    for autocast in (False, True):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            _loss(model, ids, autocast=autocast).backward()
            model.get_input_embeddings().weight.grad[0, 0].item()  # the last gradient: a device that works on has come to the end
            seconds.append(time.perf_counter() - start)
        model.zero_grad()
        paces.append(Pace(autocast, OPTIMIZER_SHARE * statistics.median(seconds)))
    return min(paces, key=lambda pace: pace.seconds)


def _loss(model: PreTrainedModel, ids: Tensor, *, autocast: bool) -> Tensor:
    ids = ids.to(model.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss
