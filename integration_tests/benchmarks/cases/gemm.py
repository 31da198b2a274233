"""Products with quantized and dense weights, beside bitsandbytes' modules and torch's dense product."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Target, Work
from benchmarks.inputs import normal, repeated, sets_for
from q_core import ops

SIDE = 4096
BLOCKSIZE = 64
TOKENS = (1, 4, 16, 64, 512)


def cases() -> Iterator[Case]:
    yield from _four_bit()
    yield from _int8_activations()
    yield from _int8()
    yield from _int8_weight()
    yield from _dense()


def _activations(tokens: int) -> Tensor:
    return normal(tokens, SIDE, dtype=torch.bfloat16)


def _weights(count: int) -> list[Tensor]:
    return repeated(lambda: normal(SIDE, SIDE, dtype=torch.bfloat16, scale=0.02), count)


def _evaluating_linear4bit(weight: Tensor) -> torch.nn.Module:
    """The module as people use it for inference; its first forward packs the weight for the CPU."""
    layer = bnb.nn.Linear4bit(SIDE, SIDE, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", quant_storage=torch.uint8)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=BLOCKSIZE)
    layer.to("cpu").eval()
    with torch.no_grad():
        layer(_activations(1))
    return layer


FOUR_BIT_TARGETS = {
    1: Target(fraction=0.85, ratio=1.5, peers=("bitsandbytes",)),
    4: Target(ratio=1.2),
    16: Target(ratio=1.2),
    64: Target(ratio=0.85, peers=("torch bf16",)),
    512: Target(ratio=0.95, peers=("torch bf16",)),
}


def _four_bit() -> Iterator[Case]:
    count = sets_for(SIDE * SIDE // 2)
    weights = _weights(count)
    packed = [ops.quantize_4bit(w, blocksize=BLOCKSIZE) for w in weights]
    theirs = [_evaluating_linear4bit(w) for w in weights]
    for tokens in TOKENS:
        x = _activations(tokens)
        yield Case(
            "gemm_4bit [nf4]", f"{tokens} × {SIDE}²", "bfloat16",
            lambda i, x=x: ops.gemm_4bit(x, *packed[i], shape=(SIDE, SIDE), blocksize=BLOCKSIZE),
            {"bitsandbytes": lambda i, x=x: theirs[i](x), "torch bf16": lambda i, x=x: F.linear(x, weights[i])},
            sets=count, target=FOUR_BIT_TARGETS[tokens],
            work=Work("read", SIDE * SIDE // 2 + 4 * SIDE * SIDE // BLOCKSIZE) if tokens == 1 else None,
        )  # fmt: skip


def _int8_activations() -> Iterator[Case]:
    count = sets_for(SIDE * SIDE // 2)
    weights = _weights(count)
    packed = [ops.quantize_4bit(w, blocksize=BLOCKSIZE) for w in weights]
    for tokens in (16, 64, 512):
        x = _activations(tokens)
        yield Case(
            "gemm_4bit [nf4, int8 activations]", f"{tokens} × {SIDE}²", "bfloat16",
            lambda i, x=x: ops.gemm_4bit(x, *packed[i], shape=(SIDE, SIDE), blocksize=BLOCKSIZE, activations="int8"),
            {"torch bf16": lambda i, x=x: F.linear(x, weights[i])},
            sets=count, target=Target(ratio=1.5),
        )  # fmt: skip


INT8_TARGETS = {
    1: Target(ratio=1.5), 4: Target(ratio=5), 16: Target(ratio=2),
    64: Target(ratio=1, peers=("torch._int_mm and scaling",)), 512: Target(ratio=1, peers=("torch._int_mm and scaling",)),
}  # fmt: skip


def _int8() -> Iterator[Case]:
    count = sets_for(SIDE * SIDE)
    weights = _weights(count)
    rows = [ops.quantize_int8_rowwise(w)[:2] for w in weights]
    theirs = [_linear8bit(w) for w in weights]
    for tokens in TOKENS:
        x = _activations(tokens)
        q, scale, _ = ops.quantize_int8_rowwise(x)

        def multiply_and_scale(i: int, q: Tensor = q, scale: Tensor = scale) -> Tensor:
            w, w_scale = rows[i]
            return (torch._int_mm(q, w.T).float() * (scale[:, None] * w_scale * (1 / 16129))).bfloat16()

        yield Case(
            "int8_gemm", f"{tokens} × {SIDE}²", "bfloat16",
            lambda i, q=q, s=scale: ops.int8_gemm(q, rows[i][0], s, rows[i][1], dtype=torch.bfloat16),
            {
                "torch._int_mm alone": lambda i, q=q: torch._int_mm(q, rows[i][0].T),
                "torch._int_mm and scaling": multiply_and_scale,
                "bitsandbytes": lambda i, x=x: theirs[i](x),
            },
            sets=count, target=INT8_TARGETS[tokens], work=Work("read", SIDE * SIDE) if tokens == 1 else None,
        )  # fmt: skip


def _linear8bit(weight: Tensor) -> torch.nn.Module:
    layer = bnb.nn.Linear8bitLt(SIDE, SIDE, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer.to("cpu").eval()
    with torch.no_grad():
        layer(_activations(1))
    return layer


def _int8_weight() -> Iterator[Case]:
    count = sets_for(SIDE * SIDE)
    weights = _weights(count)
    rows = [ops.quantize_int8_rowwise(w)[:2] for w in weights]
    for tokens in TOKENS:
        x = _activations(tokens)
        yield Case(
            "gemm_int8_weight", f"{tokens} × {SIDE}²", "bfloat16",
            lambda i, x=x: ops.gemm_int8_weight(x, *rows[i]),
            {"torch bf16": lambda i, x=x: F.linear(x, weights[i])},
            sets=count, work=Work("read", SIDE * SIDE) if tokens == 1 else None,
        )  # fmt: skip


def _dense() -> Iterator[Case]:
    count = sets_for(2 * SIDE * SIDE)
    weights = _weights(count)
    for tokens in (1, 2, 4, 8, 64, 512):
        x = _activations(tokens)
        yield Case(
            "gemm", f"{tokens} × {SIDE}²", "bfloat16",
            lambda i, x=x: ops.gemm(x, weights[i]),
            {"torch bf16": lambda i, x=x: F.linear(x, weights[i])},
            sets=count, target=Target(ratio=1.5) if tokens <= 8 else Target(),
            work=Work("read", 2 * SIDE * SIDE) if tokens == 1 else None,
        )  # fmt: skip
