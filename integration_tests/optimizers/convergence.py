"""The same training at every precision of the states: the demo's language model, and residual layers on data made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo import data
from demo.settings import FULL, Settings
from demo.training import FINAL_SHARE, new_model, train
from q_optim import AdamW

SEEDS = (0, 1, 2)
MARGIN_8BIT = 0.01
"""How far a final loss of 8-bit states may be from that of 32-bit states, as a share of it."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to hold states and weights."""

    title: str
    bits: int
    dtype: torch.dtype = torch.float32
    stochastic_rounding: bool = False

    def optimizer(self, model: nn.Module, lr: float) -> AdamW:
        return AdamW(
            model.parameters(),
            lr=lr,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            optim_bits=self.bits,
            stochastic_rounding=self.stochastic_rounding,
        )


VARIANTS = (
    Variant("32-bit states", 32),
    Variant("8-bit states", 8),
    Variant("4-bit states", 4),
    Variant("8-bit states, bfloat16 weights, to the nearest", 8, torch.bfloat16),
    Variant("8-bit states, bfloat16 weights, stochastic rounding", 8, torch.bfloat16, stochastic_rounding=True),
)

Losses = dict[str, list[float]]
"""Final losses by the variant's title, one a seed."""


def language_model(settings: Settings = FULL, *, steps: int = 200, seeds: tuple[int, ...] = SEEDS) -> Losses:
    """The demo's Llama on the standard library's sources."""
    main, _ = data.read_library()
    tokenizer = data.train_tokenizer(main.train, vocab_size=settings.vocab_size)
    stream = data.token_stream(tokenizer, main.train)
    phase = replace(settings.pretraining, steps=steps)

    def run(variant: Variant, seed: int) -> float:
        model = new_model(settings.model_config(), seed=seed).to(variant.dtype)
        batches = data.random_windows(stream, phase, seed=seed)
        return train(model, variant.optimizer(model, phase.learning_rate), batches, phase, autocast=False, title=variant.title)

    return _all(run, seeds)


class Residual(nn.Module):
    """A few residual blocks between two linear layers."""

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(blocks))
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.last(x)
        return y


def classification(*, steps: int = 600, seeds: tuple[int, ...] = SEEDS) -> Losses:
    """Residual layers that learn what a random network of other sizes says, one answer in ten of it wrong."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10))

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(256, 32, generator=generator)
            with torch.no_grad():
                answer = teacher(x).argmax(1)
            guess = torch.randint(10, answer.shape, generator=generator)
            yield x, torch.where(torch.rand(answer.shape, generator=generator) < 0.1, guess, answer)

    def run(variant: Variant, seed: int) -> float:
        torch.manual_seed(seed)
        model = Residual(32, 192, 3, 10).to(variant.dtype)
        optimizer = variant.optimizer(model, 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        losses = []
        for x, answer in batches(seed):
            loss = F.cross_entropy(model(x.to(variant.dtype)).float(), answer)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        final = losses[-int(FINAL_SHARE * steps) :]
        return sum(final) / len(final)

    return _all(run, seeds)


def departure(losses: Mapping[str, list[float]], title: str) -> float:
    """The largest distance of a variant's final loss from that of 32-bit states, as a share of it, over the seeds."""
    exact = losses[VARIANTS[0].title]
    return max(abs(loss / other - 1) for loss, other in zip(losses[title], exact, strict=True))


def _all(run: Callable[[Variant, int], float], seeds: tuple[int, ...]) -> Losses:
    return {variant.title: [run(variant, seed) for seed in seeds] for variant in VARIANTS}
