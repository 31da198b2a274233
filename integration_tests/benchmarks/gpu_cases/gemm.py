"""Products with 4-bit and dense weights, beside torch's dense product and bitsandbytes' modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Call, Case, Target, Work
from benchmarks.gpu_cases.sizes import BITSANDBYTES, Sizes, agrees
from benchmarks.gpu_clock import sets_for
from q_core import ops
from q_core.reference import quantize as reference

BLOCKSIZE = 64
FEW = 16
MANY = 2048
CHECKED = 64
"""Tokens whose results are compared with float64's."""

DECODE = Target(fraction=0.55, ratios={"torch bf16": 2.2, "bitsandbytes": 1.5}), Target(fraction=0.75, ratios={"torch bf16": 3.0})
PREFILL = Target(ratios={"torch bf16": 0.85}), Target(ratios={"torch bf16": 0.95})
NONE = Target(), Target()


def cases(sizes: Sizes) -> Iterator[Case]:
    for N, K in sizes.sides:
        count = sets_for(N * K // 2)
        weights = [sizes.normal(N, K, scale=0.02) for _ in range(count)]
        yield from _four_bit(sizes, weights)
        yield from _dense(sizes, weights)


def shape_of(tokens: int, weight: Tensor) -> str:
    return f"{tokens} × {weight.shape[0]} × {weight.shape[1]}"


def work_of(tokens: int, weight: Tensor, weight_bytes: int) -> Work:
    """Of a few tokens the weight's bytes, of many the operations."""
    return Work("copy", weight_bytes) if tokens <= FEW else Work("matrix", 2 * tokens * weight.numel())


def _four_bit(sizes: Sizes, weights: list[Tensor]) -> Iterator[Case]:
    N, K = weights[0].shape
    settings: dict[str, Any] = {"shape": (N, K), "blocksize": BLOCKSIZE, "quant_type": "nf4"}
    packed = [ops.quantize_4bit(w, blocksize=BLOCKSIZE) for w in weights]
    theirs = [_linear4bit(w) for w in weights] if BITSANDBYTES else []
    for activations in ("native", "int8"):
        for tokens in (*sizes.few, *sizes.many):
            x = sizes.normal(tokens, K)
            some = x[:CHECKED]

            def ours(i: int, x: Tensor = x, activations: Any = activations) -> Tensor:
                return ops.gemm_4bit(x, *packed[i], **settings, activations=activations)

            def decoded_first(i: int, x: Tensor = x) -> Tensor:
                return F.linear(x, ops.dequantize_4bit(*packed[i], **settings, dtype=torch.bfloat16))

            def exact(some: Tensor = some) -> Tensor:
                return some.double() @ reference.dequantize_4bit(*packed[0], BLOCKSIZE, "nf4", (N, K), torch.float32).double().T

            peers: dict[str, Call] = {"torch bf16": lambda i, x=x: F.linear(x, weights[i])}
            if tokens > FEW:
                peers["dequantize_4bit, then torch"] = decoded_first
            if BITSANDBYTES:
                peers["bitsandbytes"] = lambda i, x=x: theirs[i](x)
            gate, stretch = DECODE if tokens <= FEW else PREFILL if tokens >= MANY else NONE
            native = activations == "native"
            yield Case(
                "gemm_4bit [nf4]" if native else "gemm_4bit [nf4, int8 activations]", shape_of(tokens, weights[0]), "bfloat16",
                ours, peers, sets=len(weights), target=gate if native else Target(), stretch=stretch if native else Target(),
                work=work_of(tokens, weights[0], packed[0][0].nbytes + packed[0][1].nbytes),
                # Rounded activations have a larger bound of their own, which the conformance suite holds them to.
                check=agrees(lambda ours=ours: ours(0)[:CHECKED], exact, torch.bfloat16) if native else None,
            )  # fmt: skip


def _linear4bit(weight: Tensor) -> torch.nn.Module:
    """The module as people use it for inference."""
    assert BITSANDBYTES is not None
    nn = BITSANDBYTES.nn
    sizes = tuple(reversed(weight.shape))
    layer: torch.nn.Module = nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    layer.weight = nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=BLOCKSIZE)
    return layer.to(weight.device).eval()


def _dense(sizes: Sizes, weights: list[Tensor]) -> Iterator[Case]:
    for tokens in (*sizes.few, *sizes.many):
        x = sizes.normal(tokens, weights[0].shape[1])
        yield Case(
            "gemm", shape_of(tokens, weights[0]), "bfloat16", lambda i, x=x: ops.gemm(x, weights[i]),
            {"torch bf16": lambda i, x=x: F.linear(x, weights[i])},
            sets=len(weights), work=work_of(tokens, weights[0], weights[0].nbytes),
            check=agrees(
                lambda x=x: ops.gemm(x, weights[0])[:CHECKED],
                lambda x=x: x[:CHECKED].double() @ weights[0].double().T,
                torch.bfloat16,
            ),
        )  # fmt: skip
