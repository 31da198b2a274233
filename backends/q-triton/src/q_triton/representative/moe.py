"""Calls of the moe family: few wide experts, as Mixtral has them, and many narrow ones, as Qwen 3 has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from q_core.experts import FOUR_BIT_FORMATS, ROW_FORMATS
from q_triton.representative.values import BF16, F32, FP8, INT8, TITLES, Calls, Values, four_bit_blocksize


@dataclass(frozen=True, slots=True)
class Experts:
    """E experts of which k a token, K features, N between the products."""

    E: int
    k: int
    K: int
    N: int


MIXTRAL, QWEN = Experts(8, 2, 4096, 14336), Experts(128, 8, 2048, 768)
ODD = Experts(8, 2, 2049, 769)
"""Rows that begin anywhere."""


def route_topk(values: Values) -> Calls:
    for T, E, k, renormalize, scoring, dtype in (
        (2048, 8, 2, True, "softmax", BF16), (2048, 128, 8, True, "softmax", BF16), (2048, 256, 8, True, "sigmoid", F32),
        (2048, 512, 10, True, "softmax", BF16), (2048, 4096, 8, False, "softmax", F32),
    ):  # fmt: skip
        yield f"{k} of {E}, {scoring}{', renormalized' * renormalize}, {TITLES[dtype]}", {
            "logits_TE": values.normal(T, E, dtype=dtype), "k": k, "renormalize": renormalize, "scoring": scoring,
        }  # fmt: skip


def _weight(values: Values, E: int, rows: int, columns: int, format: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if format == "dense":
        return values.normal(E, rows, columns, dtype=dtype), None
    if format in ROW_FORMATS:
        return values.codes(E, rows, columns, dtype={"int8": INT8, "fp8": FP8}[format]), values.uniform(E, rows)
    return values.packed(E, rows * columns // 2), values.uniform(E, rows * columns // four_bit_blocksize(format))


def fused_moe(values: Values) -> Calls:
    for T, experts, format, dtype in (
        *((T, QWEN, "dense", BF16) for T in (1, 16, 64, 512, 4096)), (1, MIXTRAL, "dense", BF16), (1, QWEN, "int8", BF16),
        (512, MIXTRAL, "dense", BF16), (512, ODD, "dense", BF16), (512, QWEN, "fp8", BF16), (4096, QWEN, "int8", BF16),
        *((T, QWEN, "nf4", BF16) for T in (1, 4096)), (1, QWEN, "fp4", BF16), (1, QWEN, "int4", BF16),
        (512, QWEN, "mxfp4", BF16), (4096, QWEN, "nvfp4", BF16), (1, QWEN, "dense", F32), (4096, QWEN, "dense", F32),
    ):  # fmt: skip
        w13, w13_scale = _weight(values, experts.E, 2 * experts.N, experts.K, format, dtype)
        w2, w2_scale = _weight(values, experts.E, experts.K, experts.N, format, dtype)
        yield f"T={T}, {experts.k} of {experts.E} x {experts.K}, {format}, {TITLES[dtype]}", {
            "x_TK": values.normal(T, experts.K, dtype=dtype), "w13": w13, "w2": w2, "topk_weights": values.uniform(T, experts.k),
            "topk_ids": values.integers(T, experts.k, low=0, high=experts.E, dtype=torch.int32),
            "format": format, "intermediate_size": experts.N, "w13_scale": w13_scale, "w2_scale": w2_scale,
            "blocksize": four_bit_blocksize(format) if format in FOUR_BIT_FORMATS else 64,
        }  # fmt: skip
