"""Norms, rotary embedding and gated activation. Contracts: :mod:`q_core.ops.norm`.

The kernels step from row to row by a stride, so a slice of a fused projection is read where it lies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from q_core.backend import impl
from q_cpu.runtime import native
from q_cpu.support import decline_dtype, with_contiguous_last_axis


def _rows(x: Tensor) -> Tensor:
    """``x`` as [rows, K] with the last axis contiguous: a view where its strides allow one."""
    K = x.shape[-1]
    return with_contiguous_last_axis(x.reshape(math.prod(x.shape[:-1]), K))


def _accepts_x(x: Tensor) -> str | None:
    return decline_dtype("x", x.dtype)


def _accepts_heads(q_THD: Tensor) -> str | None:
    return decline_dtype("q_THD", q_THD.dtype)


@impl(accepts=_accepts_x)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square of the last axis, times a weight."""
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    native.rms_norm(rows, weight.contiguous(), eps, rows.shape[0], rows.shape[1], out)
    return out


@impl(accepts=_accepts_x)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a residual, then ``rms_norm``: the normed sum and the sum."""
    rows = _rows(x)
    total, out = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    native.add_rms_norm(rows, _rows(residual), weight.contiguous(), eps, rows.shape[0], rows.shape[1], total, out)
    return out, total


@impl(accepts=_accepts_heads)
def rotary_embedding(
    q_THD: Tensor, k_TGD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions."""
    (T, H, D), G, (P, F) = q_THD.shape, k_TGD.shape[1], cos.shape
    q, k = torch.empty(q_THD.shape, dtype=q_THD.dtype), torch.empty(k_TGD.shape, dtype=k_TGD.dtype)
    native.rotary_embedding(
        with_contiguous_last_axis(q_THD), with_contiguous_last_axis(k_TGD), positions.contiguous(), cos.contiguous(),
        sin.contiguous(), interleaved, T, H, G, D, P, F, q, k,
    )  # fmt: skip
    return q, k


@impl(accepts=_accepts_x)
def silu_and_mul(x: Tensor) -> Tensor:
    """Multiply SiLU of the first half of the last axis with its second half."""
    rows, N = _rows(x), x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype)
    native.silu_and_mul(rows, rows.shape[0], N, out)
    return out
