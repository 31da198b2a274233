"""Products with int8 weights: of int8 rows beside torch's and bitsandbytes', of rows as they are beside torch's dense product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Call, Case, Target
from benchmarks.gpu_cases.gemm import CHECKED, FEW, MANY, shape_of, work_of
from benchmarks.gpu_cases.sizes import BITSANDBYTES, Sizes, agrees
from benchmarks.gpu_clock import sets_for
from q_core import ops

SCALED = "torch._int_mm and scaling"
LEAST = 17
"""torch._int_mm takes no fewer rows on a GPU."""

GATE, STRETCH = Target(rate=1.0e15, ratios={SCALED: 1.0}), Target(rate=1.25e15)


def cases(sizes: Sizes) -> Iterator[Case]:
    for N, K in sizes.sides:
        count = sets_for(N * K)
        weights = [sizes.normal(N, K, scale=0.02) for _ in range(count)]
        rows = [ops.quantize_int8_rowwise(w)[:2] for w in weights]
        yield from _int8(sizes, weights, rows)
        yield from _weight_only(sizes, weights, rows)


def _int8(sizes: Sizes, weights: list[Tensor], rows: list[tuple[Tensor, Tensor]]) -> Iterator[Case]:
    theirs = [_linear8bit(w) for w in weights] if BITSANDBYTES else []
    for tokens in (*sizes.few, *sizes.many):
        x = sizes.normal(tokens, weights[0].shape[1])
        q, scale, _ = ops.quantize_int8_rowwise(x)

        def ours(i: int, q: Tensor = q, scale: Tensor = scale) -> Tensor:
            return ops.int8_gemm(q, rows[i][0], scale, rows[i][1], dtype=torch.bfloat16)

        def multiply_and_scale(i: int, q: Tensor = q, scale: Tensor = scale) -> Tensor:
            w, w_scale = rows[i]
            return (torch._int_mm(q, w.T) * (scale[:, None] * (w_scale * (1 / 16129)))).bfloat16()

        def exact(q: Tensor = q, scale: Tensor = scale) -> Tensor:
            w, w_scale = rows[0]
            return (q[:CHECKED].double() @ w.double().T) * (scale[:CHECKED, None].double() * w_scale.double() / 16129)

        peers: dict[str, Call] = {"torch bf16": lambda i, x=x: F.linear(x, weights[i])}
        if tokens >= LEAST:
            peers |= {SCALED: multiply_and_scale, "torch._int_mm alone": lambda i, q=q: torch._int_mm(q, rows[i][0].T)}
        if BITSANDBYTES:
            half = x.half()  # what its kernels take
            peers["bitsandbytes, with quantization"] = lambda i, x=half: theirs[i](x)
        gate, stretch = (GATE, STRETCH) if tokens >= MANY else (Target(), Target())
        yield Case(
            "int8_gemm", shape_of(tokens, weights[0]), "bfloat16", ours, peers,
            sets=len(weights), target=gate, stretch=stretch, work=work_of(tokens, weights[0], rows[0][0].nbytes),
            check=agrees(lambda ours=ours: ours(0)[:CHECKED], exact, torch.bfloat16),
        )  # fmt: skip


def _linear8bit(weight: Tensor) -> torch.nn.Module:
    assert BITSANDBYTES is not None
    nn = BITSANDBYTES.nn
    sizes = tuple(reversed(weight.shape))
    layer: torch.nn.Module = nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=0.0, device="meta")
    layer.weight = nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to(weight.device).eval()


def _weight_only(sizes: Sizes, weights: list[Tensor], rows: list[tuple[Tensor, Tensor]]) -> Iterator[Case]:
    for tokens in (*sizes.few, *(tokens for tokens in sizes.many if tokens > FEW)):
        x = sizes.normal(tokens, weights[0].shape[1])

        def ours(i: int, x: Tensor = x) -> Tensor:
            return ops.gemm_int8_weight(x, *rows[i])

        def exact(x: Tensor = x) -> Tensor:
            w, w_scale = rows[0]
            return x[:CHECKED].double() @ (w.double() * (w_scale.double() / 127)[:, None]).T

        yield Case(
            "gemm_int8_weight", shape_of(tokens, weights[0]), "bfloat16", ours,
            {"torch bf16": lambda i, x=x: F.linear(x, weights[i])},
            sets=len(weights), work=work_of(tokens, weights[0], rows[0][0].nbytes),
            check=agrees(lambda ours=ours: ours(0)[:CHECKED], exact, torch.bfloat16),
        )  # fmt: skip
