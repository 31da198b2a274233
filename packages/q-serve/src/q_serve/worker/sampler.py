"""From logits to tokens.

A draw is a function of the request's seed and the token's number alone, and each row of logits is treated by itself, so that a request's
tokens don't depend on what it is batched with, nor on being preempted and computed again.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from q_serve.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row is sampled with: the request's parameters, and which of its tokens this is, from 0."""

    params: SamplingParams
    index: int


def uniform(seed: int, index: int) -> float:
    """Random number ``index`` of a seed, in [0, 1): 53 bits of a SHA-256."""
    digest = hashlib.sha256(struct.pack("<QQ", seed, index)).digest()
    return float(int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53


def sample(logits_RV: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """Choose a token for each row.

    Args:
        logits_RV: floating-point [R, V].
        draws: R of them.

    Returns:
        R token ids; ``None`` for a row whose logits are not finite (its largest is NaN or infinite).
    """
    logits_RV = logits_RV.float()
    largest_R, tokens_R = logits_RV.max(dim=-1)
    finite: list[bool] = largest_R.isfinite().tolist()
    tokens: list[int | None] = list(tokens_R.tolist())
    drawn = [row for row, draw in enumerate(draws) if finite[row] and not draw.params.greedy]
    plain = [row for row in drawn if draws[row].params.keeps_all]
    truncated = [row for row in drawn if not draws[row].params.keeps_all]
    for rows, choose in ((plain, _sample_all), (truncated, _sample_truncated)):
        if rows:
            chosen = choose(logits_RV[rows] - largest_R[rows, None], [draws[row] for row in rows])
            for row, token in zip(rows, chosen.tolist(), strict=True):
                tokens[row] = token
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def _sample_all(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Sample from all tokens; the largest logit of each row is 0."""
    return _invert(_probabilities(logits_RV, draws), draws)


def _sample_truncated(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Sample from the most likely tokens, by top_k and top_p."""
    ordered_RV, order = logits_RV.sort(dim=-1, descending=True, stable=True)
    probabilities = _probabilities(ordered_RV, draws)
    V = logits_RV.shape[-1]
    top_k = _column([draw.params.top_k or V for draw in draws], logits_RV)
    top_p = _column([draw.params.top_p for draw in draws], logits_RV)
    probabilities = probabilities.masked_fill(torch.arange(V, device=logits_RV.device) >= top_k, 0.0)
    # top_p is of what top_k left. A token stays if those before it don't reach top_p, so the first always does.
    total = probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p * total, 0.0)
    return order.gather(-1, _invert(probabilities, draws)[:, None]).squeeze(-1)


def _probabilities(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Probabilities at each row's temperature, float64, not normalized."""
    return (logits_RV.double() / _column([draw.params.temperature for draw in draws], logits_RV)).exp()


def _invert(probabilities_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The index at which each row's cumulative sum passes its random number."""
    cumulative = probabilities_RV.cumsum(dim=-1)
    numbers = _column([uniform(draw.params.seed, draw.index) for draw in draws], probabilities_RV)
    # Rounding may make the product the whole sum, and then nothing passes it.
    index = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).squeeze(-1)
    last = (probabilities_RV > 0).int().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(index, last)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
