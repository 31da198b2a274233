"""Training from scratch with two optimizers, and fine-tuning of adapters: one loop."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

from demo.settings import Phase

WARMUP_SHARE = 0.05
FINAL_SHARE = 0.1
"""The final loss is the mean over this share of the steps: one batch alone is noise."""


def new_model(config: LlamaConfig, *, seed: int) -> LlamaForCausalLM:
    """A float32 model of random weights, the same for the same seed."""
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


def bfloat16_is_faster(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether this processor trains faster under bfloat16 autocast: those without instructions for it don't."""
    seconds = {}
    for autocast in (False, True):
        _loss(model, ids, autocast=autocast).backward()  # the first call of a kind also prepares its kernels
        start = time.perf_counter()
        _loss(model, ids, autocast=autocast).backward()
        seconds[autocast] = time.perf_counter() - start
    model.zero_grad()
    return seconds[True] < seconds[False]


def _loss(model: PreTrainedModel, ids: Tensor, *, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss
