"""Calls of the gemm family: products of Llama 3's layers, from one token to a prompt."""

from __future__ import annotations

import torch

from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.layouts import CANONICAL
from q_core.record import Arguments
from q_triton.representative.values import BF16, F16, F32, TITLES, Calls, Values, four_bit_blocksize

N, K = 14336, 4096
KEYS = 1024
"""Out features of a key projection: too few to fill a GPU, so that products are divided along K."""
TOKENS = (1, 4, 16, 32, 64, 512, 4096)


def gemm(values: Values) -> Calls:
    for T, dtype in ((1, BF16), (512, BF16)):
        yield f"T={T}, {TITLES[dtype]}", {
            "x_TK": values.normal(T, K, dtype=dtype), "w_NK": values.normal(N, K, dtype=dtype), "bias": None, "layout": CANONICAL,
        }  # fmt: skip


def gemm_4bit(values: Values) -> Calls:
    others = ((T, quant_type, BF16) for quant_type in FOUR_BIT_BOOKS if quant_type != "nf4" for T in (1, 512))
    floats = ((1, "nf4", F16), (1, "nf4", F32), (512, "nf4", F32))
    for T, quant_type, dtype in (*((T, "nf4", BF16) for T in TOKENS), *others, *floats):
        yield _gemm_4bit(values, T, N, K, quant_type, dtype, "native")
    yield _gemm_4bit(values, 256, N, K, "nf4", BF16, "native")
    yield _gemm_4bit(values, 1, N, K, "nf4", BF16, "int8")
    yield _gemm_4bit(values, 512, K, N, "nf4", BF16, "int8")


def _gemm_4bit(
    values: Values, T: int, N: int, K: int, quant_type: str, dtype: torch.dtype, activations: str
) -> tuple[str, Arguments]:
    blocksize = four_bit_blocksize(quant_type)
    return f"T={T}, {N} x {K}, {quant_type}, {TITLES[dtype]}, {activations} activations", {
        "x_TK": values.normal(T, K, dtype=dtype), "packed": values.packed(N * K // 2), "absmax": values.uniform(N * K // blocksize),
        "blocksize": blocksize, "quant_type": quant_type, "shape": [N, K], "bias": None, "activations": activations,
        "layout": CANONICAL,
    }  # fmt: skip


def int8_gemm(values: Values) -> Calls:
    for T, rows, dtype, biased in (
        *((T, N, BF16, False) for T in TOKENS), (512, N, BF16, True), (512, N, F32, False), (1, KEYS, BF16, True), (512, KEYS, BF16, False),
    ):  # fmt: skip
        yield f"T={T}, N={rows}, {TITLES[dtype]}{', bias' * biased}", {
            "a_TK": values.codes(T, K), "b_NK": values.codes(rows, K), "a_scale": values.uniform(T), "b_scale": values.uniform(rows),
            "bias": values.normal(rows, dtype=dtype) if biased else None, "dtype": dtype, "layout": CANONICAL,
        }  # fmt: skip


def gemm_int8_weight(values: Values) -> Calls:
    for T, rows, dtype in (
        *((T, N, BF16) for T in TOKENS), (1, N, F32), (64, N, F32), (512, N, F16), (512, N, F32), (1, KEYS, BF16), (512, KEYS, BF16),
    ):  # fmt: skip
        yield f"T={T}, N={rows}, {TITLES[dtype]}", {
            "x_TK": values.normal(T, K, dtype=dtype), "w_NK": values.codes(rows, K), "w_scale": values.uniform(rows), "bias": None,
            "layout": CANONICAL,
        }  # fmt: skip
