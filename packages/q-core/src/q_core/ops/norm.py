"""What a decoder layer needs between its products: norms, rotary embedding, gated activation.

All compute in float32 and round once to the output's dtype; all have gradients.
"""

from __future__ import annotations

from torch import Tensor

from q_core import hookspecs
from q_core.dispatch import bound
from q_core.specs import norm as spec

_rms_norm = bound(hookspecs.rms_norm)
_add_rms_norm = bound(hookspecs.add_rms_norm)
_rotary_embedding = bound(hookspecs.rotary_embedding)
_silu_and_mul = bound(hookspecs.silu_and_mul)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm of the last axis (arXiv 1910.07467): ``x / sqrt(mean(x²) + eps) * weight``.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: x's dtype [K].
        eps: added to the mean of squares.

    Returns:
        Tensor [..., K] of x's dtype, contiguous.
    """
    spec.check_rms_norm(x, weight, eps)
    return _rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add the residual, then norm the sum, as one pass over memory.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        residual: x's dtype [..., K].
        weight: x's dtype [K].
        eps: added to the mean of squares.

    Returns:
        normed: x's dtype [..., K], ``rms_norm`` of the sum as rounded to it.
        total: x's dtype [..., K], ``x + residual``, the residual of the next layer.
    """
    spec.check_add_rms_norm(x, residual, weight, eps)
    return _add_rms_norm(x, residual, weight, eps)


def rotary_embedding(
    q_THD: Tensor, k_TGD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions (RoFormer, arXiv 2104.09864).

    With F = ``cos.shape[1]`` the first 2F of the D components rotate in F pairs, the others pass. Pair i is (i, i + F) as in Llama
    checkpoints, or (2i, 2i + 1) if interleaved, as in GPT-J: ``(a, b) → (a cos - b sin, b cos + a sin)``.

    Args:
        q_THD: float32, bfloat16 or float16 [T, H, D].
        k_TGD: q's dtype [T, G, D].
        positions: int64 [T], below P (the caller's promise).
        cos, sin: float32 [P, F], tables by position, any scaling applied; 2F ≤ D.
        interleaved: how components pair.

    Returns:
        The rotated q [T, H, D] and k [T, G, D], new and contiguous.
    """
    spec.check_rotary_embedding(q_THD, k_TGD, positions, cos, sin, interleaved)
    return _rotary_embedding(q_THD, k_TGD, positions, cos, sin, interleaved)


def silu_and_mul(x: Tensor) -> Tensor:
    """Gated activation: ``silu(x[..., :N]) * x[..., N:]`` (SwiGLU, arXiv 2002.05202).

    Args:
        x: float32, bfloat16 or float16 [..., 2N].

    Returns:
        Tensor [..., N] of x's dtype, contiguous.
    """
    spec.check_silu_and_mul(x)
    return _silu_and_mul(x)
