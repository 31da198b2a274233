"""Experts beside transformers' Mixtral block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.case import Case, Target
from benchmarks.inputs import normal
from q_core import ops

EXPERTS, TOP, WIDTH, INNER = 8, 2, 2048, 4096
DTYPE = torch.bfloat16


def cases() -> Iterator[Case]:
    block = _block()
    w13, w2 = block.experts.gate_up_proj.data, block.experts.down_proj.data
    router = block.gate.weight.data
    held = {
        "dense": (w13, w2, {}),
        "int8": _int8(w13, w2),
        "nf4": _nf4(w13, w2),
    }
    for format, (ours13, ours2, scales) in held.items():
        settings: dict[str, Any] = {"format": format, "intermediate_size": INNER, **scales}
        for tokens in (1, 4, 16, 64):
            x = normal(tokens, WIDTH, dtype=DTYPE)

            def ours(_: int, x: Tensor = x, w13: Tensor = ours13, w2: Tensor = ours2, settings: Any = settings) -> Tensor:
                weights, ids = ops.route_topk(ops.gemm(x, router), k=TOP)
                return ops.fused_moe(x, w13, w2, weights, ids, **settings)

            ratio = 1.5 if format == "dense" else 2.5 if tokens == 1 else None
            yield Case(
                f"fused_moe [{format}]", f"{tokens} × {WIDTH}, {EXPERTS} experts of {INNER}, top {TOP}", "bfloat16",
                ours, {"transformers": lambda i, x=x: block(x[None])}, target=Target(ratio=ratio),
            )  # fmt: skip


def _block() -> MixtralSparseMoeBlock:
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=TOP, experts_implementation="eager"
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config).to(DTYPE).eval().requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return block


def _int8(w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    (q13, scale13, _), (q2, scale2, _) = ops.quantize_int8_rowwise(w13), ops.quantize_int8_rowwise(w2)
    return q13, q2, {"w13_scale": scale13, "w2_scale": scale2}


def _nf4(w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    (q13, scale13), (q2, scale2) = (zip(*(ops.quantize_4bit(expert) for expert in w), strict=True) for w in (w13, w2))
    return torch.stack(q13), torch.stack(q2), {"w13_scale": torch.stack(scale13), "w2_scale": torch.stack(scale2)}
