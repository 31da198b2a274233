"""How a request wants its tokens chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request's sampling.

    Attributes:
        max_tokens: the most tokens to generate.
        temperature: divides the logits; 0 is greedy.
        top_p: keep the most likely tokens whose probabilities first reach this sum, in (0, 1].
        top_k: keep this many of the most likely tokens; 0 keeps all.
        seed: start of the request's random draws. Draw i depends on the seed and i alone, not on the batch.
        stop_token_ids: tokens that end the request, each counted as generated.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}, expected a finite number, 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number above 0, at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (all tokens) or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}, expected an integer in 0…2^63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def keeps_all(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_p == 1 and self.top_k == 0
