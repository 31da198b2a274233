"""Calls of the norm family: rows of whole models, and those of single heads."""

from __future__ import annotations

import torch

from q_triton.representative.values import BF16, F32, TITLES, Calls, Values

EPS = 1e-6


def rms_norm(values: Values) -> Calls:
    for T, K, dtype in (
        (65536, 128, BF16), (2048, 1024, BF16), (2048, 4096, BF16), (2048, 8192, BF16), (2048, 16384, BF16),
        (2048, 4096, F32),
    ):  # fmt: skip
        x, weight = values.normal(T, K, dtype=dtype), values.normal(K, dtype=dtype)
        yield f"{T} rows of {K}, {TITLES[dtype]}", {"x": x, "weight": weight, "eps": EPS}


def add_rms_norm(values: Values) -> Calls:
    for T, K, dtype in ((2048, 4096, BF16), (2048, 8192, BF16), (2048, 16384, BF16), (2048, 4096, F32)):
        x, residual = (values.normal(T, K, dtype=dtype) for _ in range(2))
        weight = values.normal(K, dtype=dtype)
        yield f"{T} rows of {K}, {TITLES[dtype]}", {"x": x, "residual": residual, "weight": weight, "eps": EPS}


def rotary_embedding(values: Values) -> Calls:
    # Llama's heads; GPT-J's pairs and its heads that turn in part.
    for T, H, G, D, F, interleaved, dtype in (
        (2048, 32, 8, 128, 64, False, BF16), (2048, 16, 16, 256, 32, True, BF16), (2048, 32, 32, 128, 64, False, F32),
    ):  # fmt: skip
        table = values.normal(4096, 2 * F, dtype=F32)
        yield (
            f"{T} tokens, {H} + {G} heads of {D}, {2 * F} turn{' interleaved' * interleaved}, {TITLES[dtype]}",
            {
                "q_THD": values.normal(T, H, D, dtype=dtype),
                "k_TGD": values.normal(T, G, D, dtype=dtype),
                "positions": values.given(range(T), dtype=torch.int64),
                "cos": table[:, :F].contiguous(),
                "sin": table[:, F:].contiguous(),
                "interleaved": interleaved,
            },
        )


def silu_and_mul(values: Values) -> Calls:
    for T, N, dtype in ((65536, 128, BF16), (2048, 14336, BF16), (2048, 14336, F32)):
        yield f"{T} rows of {N}, {TITLES[dtype]}", {"x": values.normal(T, 2 * N, dtype=dtype)}
