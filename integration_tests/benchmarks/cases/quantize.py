"""Quantization beside bitsandbytes, held against copying what is read and written."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as peer
import torch

from benchmarks.case import Case, Target, Work
from benchmarks.inputs import normal, repeated
from q_core import ops
from q_core.formats.codebooks import dynamic_map

SIDE = 4096
ELEMENTS = SIDE * SIDE


def cases() -> Iterator[Case]:
    yield from _blockwise()
    yield from _four_bit()
    yield from _rows()


def _blockwise() -> Iterator[Case]:
    blocksize = 256
    scales = 4 * ELEMENTS // blocksize
    x = repeated(lambda: normal(SIDE, SIDE), 2)
    yield Case(
        "quantize_blockwise", f"{SIDE}², block {blocksize}", "float32",
        lambda i: ops.quantize_blockwise(x[i], blocksize=blocksize),
        {"bitsandbytes": lambda i: peer.quantize_blockwise(x[i], blocksize=blocksize)},
        sets=2, target=Target(fraction=0.55), work=Work("copy", 5 * ELEMENTS + scales),
    )  # fmt: skip
    codes, absmax = ops.quantize_blockwise(x[0], blocksize=blocksize)
    _, state = peer.quantize_blockwise(x[0], blocksize=blocksize)
    code = dynamic_map(signed=True)  # the default of both libraries
    yield Case(
        "dequantize_blockwise", f"{SIDE}², block {blocksize}", "float32",
        lambda i: ops.dequantize_blockwise(codes, absmax, code, blocksize=blocksize),
        {"bitsandbytes": lambda i: peer.dequantize_blockwise(codes, state)},
        target=Target(fraction=0.80), work=Work("copy", 5 * ELEMENTS + scales),
    )  # fmt: skip


def _four_bit() -> Iterator[Case]:
    x = repeated(lambda: normal(SIDE, SIDE), 2)
    for quant_type, blocksize in (("nf4", 64), ("fp4", 64), ("int4", 64), ("mxfp4", 32), ("nvfp4", 16)):
        scales = 4 * ELEMENTS // blocksize
        theirs = quant_type in ("nf4", "fp4")
        packed, absmax = ops.quantize_4bit(x[0], blocksize=blocksize, quant_type=quant_type)
        yield Case(
            f"quantize_4bit [{quant_type}]", f"{SIDE}², block {blocksize}", "float32",
            lambda i, b=blocksize, t=quant_type: ops.quantize_4bit(x[i], blocksize=b, quant_type=t),
            {"bitsandbytes": lambda i, b=blocksize, t=quant_type: peer.quantize_4bit(x[i], blocksize=b, quant_type=t)}
            if theirs else {},
            sets=2, target=Target(fraction=0.80) if quant_type == "nf4" else Target(),
            work=Work("copy", 4 * ELEMENTS + ELEMENTS // 2 + scales),
        )  # fmt: skip
        peers = {}
        if theirs:
            their_packed, state = peer.quantize_4bit(x[0].bfloat16(), blocksize=blocksize, quant_type=quant_type)
            peers["bitsandbytes"] = lambda i, p=their_packed, s=state: peer.dequantize_4bit(p, s)
        yield Case(
            f"dequantize_4bit [{quant_type}]", f"{SIDE}², block {blocksize}", "bfloat16",
            lambda i, p=packed, a=absmax, b=blocksize, t=quant_type: ops.dequantize_4bit(
                p, a, shape=(SIDE, SIDE), blocksize=b, quant_type=t, dtype=torch.bfloat16
            ),
            peers, target=Target(fraction=0.85) if quant_type == "nf4" else Target(),
            work=Work("copy", 2 * ELEMENTS + ELEMENTS // 2 + scales),
        )  # fmt: skip


def _rows() -> Iterator[Case]:
    x = repeated(lambda: normal(SIDE, SIDE, dtype=torch.bfloat16), 3)
    yield Case(
        "quantize_int8_rowwise", f"{SIDE}²", "bfloat16",
        lambda i: ops.quantize_int8_rowwise(x[i]),
        {"bitsandbytes": lambda i: peer.int8_vectorwise_quant(x[i].half())},
        sets=3, work=Work("copy", 3 * ELEMENTS),
    )  # fmt: skip
