"""Reference of the norm family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from q_core.backend import impl
from q_core.reference.widen import widen


@impl
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype).contiguous()


@impl
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = (widen(x) + widen(residual)).to(x.dtype).contiguous()
    return rms_norm(total, weight, eps), total


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    pairs = cos.shape[-1]
    wide = widen(x)
    rotated, rest = wide[..., : 2 * pairs], wide[..., 2 * pairs :]
    cos, sin = cos.to(wide.dtype).unsqueeze(1), sin.to(wide.dtype).unsqueeze(1)
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, -1)
    new = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(new, -1).flatten(-2) if interleaved else torch.cat(new, -1)
    return torch.cat((turned, rest), -1).to(x.dtype)


@impl
def rotary_embedding(
    q_THD: Tensor, k_TGD: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos[positions], sin[positions]
    return _rotate(q_THD, cos, sin, interleaved), _rotate(k_TGD, cos, sin, interleaved)


@impl
def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = widen(x).chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype).contiguous()
