"""Calls of the quantize family: a weight of 4096 x 14336, and the activations of a layer."""

from __future__ import annotations

from q_core.formats.codebooks import FOUR_BIT_BOOKS, dynamic_map
from q_triton.representative.values import BF16, F32, TITLES, Calls, Values, four_bit_blocksize

WEIGHT = (4096, 14336)


def _blocks(blocksize: int) -> int:
    return WEIGHT[0] * WEIGHT[1] // blocksize


def quantize_blockwise(values: Values) -> Calls:
    for blocksize, dtype in ((256, BF16), (64, BF16), (4096, BF16), (256, F32)):
        yield f"blocks of {blocksize}, {TITLES[dtype]}", {
            "A": values.normal(*WEIGHT, dtype=dtype), "code": dynamic_map(signed=True, device=values.device), "blocksize": blocksize,
        }  # fmt: skip


def dequantize_blockwise(values: Values) -> Calls:
    for blocksize, dtype in ((256, BF16), (64, BF16), (256, F32)):
        yield f"blocks of {blocksize}, {TITLES[dtype]}", {
            "codes": values.packed(*WEIGHT), "absmax": values.uniform(_blocks(blocksize)),
            "code": dynamic_map(signed=True, device=values.device), "blocksize": blocksize, "dtype": dtype,
        }  # fmt: skip


def quantize_4bit(values: Values) -> Calls:
    settings = [(quant_type, four_bit_blocksize(quant_type), BF16) for quant_type in FOUR_BIT_BOOKS]
    for quant_type, blocksize, dtype in (*settings, ("nf4", 4096, BF16), ("nf4", 64, F32)):
        yield f"{quant_type}, blocks of {blocksize}, {TITLES[dtype]}", {
            "A": values.normal(*WEIGHT, dtype=dtype), "blocksize": blocksize, "quant_type": quant_type,
        }  # fmt: skip


def dequantize_4bit(values: Values) -> Calls:
    settings = [(quant_type, four_bit_blocksize(quant_type), BF16) for quant_type in FOUR_BIT_BOOKS]
    for quant_type, blocksize, dtype in (*settings, ("nf4", 64, F32)):
        yield f"{quant_type}, blocks of {blocksize}, {TITLES[dtype]}", {
            "packed": values.packed(WEIGHT[0] * WEIGHT[1] // 2), "absmax": values.uniform(_blocks(blocksize)),
            "blocksize": blocksize, "quant_type": quant_type, "shape": list(WEIGHT), "dtype": dtype,
        }  # fmt: skip


def quantize_int8_rowwise(values: Values) -> Calls:
    for T, K, dtype, threshold in (
        (65536, 128, BF16, 0.0), (2048, 1024, BF16, 0.0), (2048, 4096, BF16, 0.0), (2048, 4096, BF16, 6.0), (2048, 14336, BF16, 0.0),
        (2048, 4096, F32, 6.0),
    ):  # fmt: skip
        yield f"{T} rows of {K}, threshold {threshold}, {TITLES[dtype]}", {
            "A_TK": values.normal(T, K, dtype=dtype), "threshold": threshold,
        }  # fmt: skip
