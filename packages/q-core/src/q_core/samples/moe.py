"""Sample calls of the moe family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q_core.experts import EXPERT_FORMATS, FOUR_BIT_FORMATS
from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.samples.make import Make


@dataclass(frozen=True, slots=True)
class Layer:
    """Sizes of a call: T tokens, E experts of which k a token, K features, N between the products."""

    T: int
    E: int
    k: int
    K: int
    N: int


LAYERS = (Layer(5, 4, 2, 32, 16), Layer(1, 8, 2, 48, 24), Layer(0, 3, 1, 8, 8), Layer(9, 3, 3, 33, 7))


def draw_layer(make: Make) -> Layer:
    E = make.size(1, 6)
    return Layer(make.size(0, 12), E, make.size(1, E), make.size(1, 70), make.size(1, 40))


def route_topk(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for layer in make.cases(LAYERS, draw_layer):
        for scoring in ("softmax", "sigmoid"):
            for renormalize in (True, False):
                logits = make.normal(layer.T, layer.E, dtype=dtype, scale=2.0)
                yield {"logits_TE": logits, "k": layer.k, "renormalize": renormalize, "scoring": scoring}
    # Equal logits: the lower id first.
    yield {"logits_TE": make.integers(20, 6, low=0, high=3).to(dtype), "k": 3, "renormalize": True, "scoring": "softmax"}


def _experts(
    make: Make, E: int, rows: int, columns: int, format: str, blocksize: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    if format in FOUR_BIT_FORMATS:
        packed = make.integers(E, -(-rows * columns // 2), low=0, high=256, dtype=torch.uint8)
        return packed, make.uniform(E, -(-rows * columns // blocksize), high=0.5)
    if format == "dense":
        return make.normal(E, rows, columns, dtype=dtype, scale=0.3), None
    codes = make.integers(E, rows, columns, low=-127, high=128, dtype=torch.int8)
    return codes if format == "int8" else codes.float().to(torch.float8_e4m3fn), make.uniform(E, rows, high=0.5)


def fused_moe(make: Make, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    for format in EXPERT_FORMATS:
        blocksize = FOUR_BIT_BOOKS[format].blocksizes[0] if format in FOUR_BIT_FORMATS else 64
        for layer in make.cases(LAYERS if format == "dense" else LAYERS[1::2], draw_layer):
            w13, w13_scale = _experts(make, layer.E, 2 * layer.N, layer.K, format, blocksize, dtype)
            w2, w2_scale = _experts(make, layer.E, layer.K, layer.N, format, blocksize, dtype)
            ids = (
                torch.stack([make.permutation(layer.E)[: layer.k] for _ in range(layer.T)]) if layer.T else torch.empty(0, layer.k)
            )
            ids = ids.to(torch.int32)
            ids[: layer.T // 4, -1] = -1
            yield {
                "x_TK": make.normal(layer.T, layer.K, dtype=dtype), "w13": w13, "w2": w2,
                "topk_weights": make.uniform(layer.T, layer.k), "topk_ids": ids,
                "format": format, "intermediate_size": layer.N, "w13_scale": w13_scale, "w2_scale": w2_scale, "blocksize": blocksize,
            }  # fmt: skip
