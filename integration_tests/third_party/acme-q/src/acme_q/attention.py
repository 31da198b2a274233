"""Attention over the paged cache, one cache block after the other, with a running softmax (arXiv 2205.14135).

Letters: n queries of a request, G kv heads, P query heads a kv head (H = G * P), D head dim, S slots of a block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from acme_q.arrays import decline_dtype, float_array, tensor_of
from acme_q.served import counted
from q_core.backend import impl


def _accepts(q_THD: Tensor, k_cache_BGSD: Tensor) -> str | None:
    if k_cache_BGSD.dtype is not q_THD.dtype:
        return f"a cache of {k_cache_BGSD.dtype} under queries of {q_THD.dtype}, only of the queries' dtype"
    return decline_dtype("q_THD", q_THD.dtype)


class RunningSoftmax:
    """A softmax-weighted sum of values that come block by block.

    Args:
        shape: [G, n, P, D] of the result.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._largest = np.full((*shape[:-1], 1), -np.inf)
        self._total = np.zeros((*shape[:-1], 1))
        self._sum = np.zeros(shape)

    def add(self, scores: np.ndarray, values: np.ndarray, unseen: np.ndarray) -> None:
        """Take a block: scores [G, n, P, S], values [G, S, D], and which query doesn't see which key [n, S]."""
        scores = np.where(unseen[:, None], -np.inf, scores)
        largest = np.maximum(self._largest, scores.max(-1, keepdims=True))
        shrink = np.exp(self._largest - largest)
        weights = np.exp(scores - largest)
        self._total = self._total * shrink + weights.sum(-1, keepdims=True)
        self._sum = self._sum * shrink + weighted(weights, values, unseen)
        self._largest = largest

    def result(self) -> np.ndarray:
        return self._sum / self._total


def weighted(weights: np.ndarray, values: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Values times weights; what a query doesn't see has no influence on it, and 0 · NaN would."""
    if np.isfinite(values).all():
        return weights @ values[:, None]
    terms = weights[..., None] * values[:, None, None]
    return np.where(unseen[:, None, :, None], 0, terms).sum(-2)


def attend(q_nHD: np.ndarray, keys: np.ndarray, values: np.ndarray, seq_len: int, scale: float, causal: bool) -> np.ndarray:
    """One request: queries at the end of a sequence, keys and values in blocks [M, G, S, D]."""
    n, H, D = q_nHD.shape
    _, G, S, _ = keys.shape
    q_GnPD = q_nHD.astype(np.float64).reshape(n, G, H // G, D).transpose(1, 0, 2, 3)
    last_seen = seq_len - n + np.arange(n) if causal else np.full(n, seq_len - 1)
    softmax = RunningSoftmax(q_GnPD.shape)
    for block, first in enumerate(range(0, seq_len, S)):
        used = min(S, seq_len - first)  # what the other slots hold may be anything, NaN too
        k_GSD, v_GSD = (cache[block, :, :used].astype(np.float64) for cache in (keys, values))
        scores = (q_GnPD @ k_GSD.transpose(0, 2, 1)[:, None]) * scale
        unseen = first + np.arange(used) > last_seen[:, None]
        softmax.add(scores, v_GSD, unseen)
    return softmax.result().transpose(1, 0, 2, 3).reshape(n, H, D)


@impl(accepts=_accepts)
@counted
def paged_attention(
    q_THD: Tensor,
    k_cache_BGSD: Tensor,
    v_cache_BGSD: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """Attend over a paged cache: prefill, chunked prefill, decode, or a mix in one batch."""
    q = float_array(q_THD)
    out = np.zeros(q.shape)
    S = k_cache_BGSD.shape[2]
    starts = query_start.tolist()
    with np.errstate(all="ignore"):
        for request, seq_len in enumerate(seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            if rows.start < rows.stop:
                blocks = block_tables[request, : -(-seq_len // S)].to(torch.int64)
                keys, values = (float_array(cache[blocks]) for cache in (k_cache_BGSD, v_cache_BGSD))
                out[rows] = attend(q[rows], keys, values, seq_len, scale, causal)
    return tensor_of(out, q_THD.dtype)
