"""Experts beside a loop over them, as models write it, and beside torch's grouped product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Target, Work
from benchmarks.gpu_cases.gemm import FEW
from benchmarks.gpu_cases.sizes import Sizes, agrees
from q_core import ops
from q_core.reference import moe as reference

LOOP, GROUPED = "loop over experts, bf16", "torch._grouped_mm, bf16"
GATE = Target(ratios={LOOP: 1.5, GROUPED: 0.9})
DECODE = Target(fraction=0.60, ratios=GATE.ratios)
STRETCH = Target(fraction=0.75)
CHECKED = 8
"""Tokens whose results are compared with float64's."""


def cases(sizes: Sizes) -> Iterator[Case]:
    for E, k, _, _ in sizes.experts:
        yield _route(sizes, E, k)
    for E, k, K, N in sizes.experts:
        w13, w2 = sizes.normal(E, 2 * N, K, scale=0.02), sizes.normal(E, K, N, scale=0.02)
        for format, held in FORMATS.items():
            settings: dict[str, Any] = {"format": format, "intermediate_size": N}
            (ours13, scale13), (ours2, scale2) = held(w13), held(w2)
            if scale13 is not None:
                settings |= {"w13_scale": scale13, "w2_scale": scale2}
            for tokens in (*sizes.few, *sizes.many):
                x = sizes.normal(tokens, K)
                weights, ids = ops.route_topk(sizes.normal(tokens, E), k=k)
                yield _case(sizes, x, weights, ids, (w13, w2), (ours13, ours2), settings)


def _route(sizes: Sizes, E: int, k: int) -> Case:
    tokens = sizes.many[-1]
    logits = sizes.normal(tokens, E)

    def composed(_: int) -> tuple[Tensor, Tensor]:
        weights, ids = logits.float().softmax(-1).topk(k)
        return weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)

    return Case(
        "route_topk", f"{tokens} × {E} experts, top {k}", "bfloat16", lambda _: ops.route_topk(logits, k=k), {"torch": composed},
        work=Work("copy", logits.nbytes + 8 * tokens * k),
        check=agrees(
            lambda: ops.route_topk(logits, k=k)[0],
            lambda: reference.route_topk(logits.double(), k, True, "softmax")[0],
            torch.float32,
        ),
    )  # fmt: skip


def _case(
    sizes: Sizes, x: Tensor, weights: Tensor, ids: Tensor, dense: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], settings: Any
) -> Case:
    (tokens, K), N, k = x.shape, settings["intermediate_size"], ids.shape[1]
    E = dense[0].shape[0]
    stored = sum(each.nbytes for each in (*held, settings.get("w13_scale"), settings.get("w2_scale")) if each is not None)
    few = tokens <= FEW
    work = Work("copy", stored * ids.unique().numel() // E) if few else Work("matrix", 6 * tokens * k * N * K)
    some = min(CHECKED, tokens)

    def ours(_: int) -> Tensor:
        return ops.fused_moe(x, *held, weights, ids, **settings)

    def exact() -> Tensor:
        return reference.fused_moe(
            x[:some].double(), *held, weights[:some].double(), ids[:some], settings["format"], N,
            settings.get("w13_scale"), settings.get("w2_scale"), BLOCKSIZE,
        )  # fmt: skip

    dense_format = settings["format"] == "dense"
    return Case(
        f"fused_moe [{settings['format']}]", f"{tokens} × {K}, {E} experts of {N}, top {k}", "bfloat16", ours,
        {LOOP: lambda _: _loop(x, *dense, weights, ids), GROUPED: lambda _: _grouped(x, *dense, weights, ids)},
        target=(DECODE if few else GATE) if dense_format else Target(), stretch=STRETCH if dense_format and few else Target(),
        work=work, launched=(LOOP,), check=agrees(lambda: ours(0)[:some], exact, torch.bfloat16),
    )  # fmt: skip


def _loop(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Each expert's own tokens, which the host waits to learn of."""
    out = torch.zeros_like(x)
    for expert in range(w13.shape[0]):
        token, place = torch.where(ids == expert)
        if token.numel():
            hidden = ops.silu_and_mul(F.linear(x[token], w13[expert]))
            out.index_add_(0, token, F.linear(hidden, w2[expert]) * weights[token, place, None].to(x.dtype))
    return out


def _grouped(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Tokens sorted by expert, all experts in one product."""
    T, k = ids.shape
    chosen, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(w13.shape[0], device=x.device), right=True).to(torch.int32)
    hidden = ops.silu_and_mul(torch._grouped_mm(x[order // k], w13.transpose(1, 2), offs=ends))
    out = torch.empty(T * k, x.shape[1], dtype=x.dtype, device=x.device)
    out[order] = torch._grouped_mm(hidden, w2.transpose(1, 2), offs=ends)
    return (out.view(T, k, -1) * weights[..., None].to(x.dtype)).sum(1)


BLOCKSIZE = 64

Held = tuple[Tensor, Tensor | None]


def _dense(w: Tensor) -> Held:
    return w, None


def _int8(w: Tensor) -> Held:
    return ops.quantize_int8_rowwise(w)[:2]


def _fp8(w: Tensor) -> Held:
    absmax = w.abs().amax(-1).float()
    return (w * (448 / absmax)[..., None]).to(torch.float8_e4m3fn), absmax


def _nf4(w: Tensor) -> Held:
    packed, absmax = zip(*(ops.quantize_4bit(expert, blocksize=BLOCKSIZE) for expert in w), strict=True)
    return torch.stack(packed), torch.stack(absmax)


FORMATS: dict[str, Callable[[Tensor], Held]] = {"dense": _dense, "int8": _int8, "fp8": _fp8, "nf4": _nf4}
