"""Norms, rotary embedding and gated activation. Contracts: :mod:`q_core.ops.norm`.

A row is read where it lies, so a slice of a fused projection costs no copy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from q_core.backend import impl
from q_triton.kernels.gate import silu_and_mul_kernel
from q_triton.kernels.norm import rms_norm_kernel
from q_triton.kernels.rotary import rotary_kernel
from q_triton.launch import launch
from q_triton.shapes import ceil_div, power_of_two, rows_of, with_contiguous_last_axis
from q_triton.tiles import Tile, Tiles, tile

RMS_NORM = Tiles(
    "rms_norm",
    (
        tile(BLOCK_T=8, BLOCK_K=256, warps=4, up_to=256),
        tile(BLOCK_T=2, BLOCK_K=1024, warps=4, up_to=1024),
        tile(BLOCK_T=1, BLOCK_K=4096, warps=8, up_to=4096),
        tile(BLOCK_T=1, BLOCK_K=8192, warps=16),
    ),
    size="elements of a row",
)
ROTARY = Tiles("rotary", (tile(BLOCK_H=8, warps=2),))
SILU_AND_MUL = Tiles(
    "silu_and_mul", (tile(BLOCK_T=8, BLOCK_N=128, up_to=128), tile(BLOCK_T=1, BLOCK_N=1024)), size="outputs of a row"
)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, K = rows_of(x), x.shape[-1]
    others = rows if residual is None else rows_of(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    T = rows.shape[0] if K else 0
    chosen = RMS_NORM.on(x.device, K)
    launch(
        rms_norm_kernel, (ceil_div(T, chosen.blocks["BLOCK_T"]),), chosen,
        x=rows, residual=others, weight=weight.contiguous(), out=out, total=total, T=T, K=K,
        x_stride=rows.stride(0), residual_stride=others.stride(0), eps=eps,
        ADD=residual is not None, WHOLE=chosen.blocks["BLOCK_K"] >= K,
    )  # fmt: skip
    return out, total


@impl
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square of the last axis, times a weight."""
    return _norm(x, None, weight, eps)[0]


@impl
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a residual, then ``rms_norm``: the normed sum and the sum."""
    return _norm(x, residual, weight, eps)


@impl
def rotary_embedding(
    q_THD: Tensor, k_TGD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions."""
    turns = (positions.contiguous(), cos.contiguous(), sin.contiguous())
    q, k = (_rotated(x, *turns, interleaved) for x in (q_THD, k_TGD))
    return q, k


def _rotated(x_THD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    (T, H, D), F = x_THD.shape, cos.shape[1]
    x = with_contiguous_last_axis(x_THD)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chosen = ROTARY.on(x.device)
    blocks = {**chosen.blocks, "BLOCK_F": power_of_two(F), "BLOCK_REST": power_of_two(D - 2 * F) if D > 2 * F else 0}
    launch(
        rotary_kernel, (T if D else 0, ceil_div(H, chosen.blocks["BLOCK_H"])), Tile(blocks, chosen.warps, chosen.stages),
        x=x, out=out, positions=positions, cos=cos, sin=sin, T=T, H=H, D=D, F=F,
        x_token_stride=x.stride(0), x_head_stride=x.stride(1), INTERLEAVED=interleaved,
    )  # fmt: skip
    return out


@impl
def silu_and_mul(x: Tensor) -> Tensor:
    """Multiply SiLU of the first half of the last axis with its second half."""
    rows, N = rows_of(x), x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    T = math.prod(x.shape[:-1])
    chosen = SILU_AND_MUL.on(x.device, N)
    grid = (ceil_div(T, chosen.blocks["BLOCK_T"]), ceil_div(N, chosen.blocks["BLOCK_N"]))
    launch(silu_and_mul_kernel, grid, chosen, x=rows, out=out, T=T, N=N, x_stride=rows.stride(0))
    return out
