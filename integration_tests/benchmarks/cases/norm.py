"""What stands between the products of a decoder layer, beside torch's composition of it, held against copying."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Target, Work
from benchmarks.inputs import normal, repeated
from q_core import ops

TOKENS, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 4096, 4096, 32, 8, 128
TARGET = Target(ratio=2, fraction=0.80)


def cases() -> Iterator[Case]:
    dtype = torch.bfloat16
    x = repeated(lambda: normal(TOKENS, WIDTH, dtype=dtype), 3)
    residual = repeated(lambda: normal(TOKENS, WIDTH, dtype=dtype), 3)
    weight = normal(WIDTH, dtype=dtype)
    size = x[0].nbytes
    shape = f"{TOKENS} × {WIDTH}"
    yield Case(
        "rms_norm", shape, "bfloat16", lambda i: ops.rms_norm(x[i], weight), {"torch": lambda i: _rms_norm(x[i], weight)},
        sets=3, target=TARGET, work=Work("copy", 2 * size),
    )  # fmt: skip
    yield Case(
        "add_rms_norm", shape, "bfloat16", lambda i: ops.add_rms_norm(x[i], residual[i], weight),
        {"torch": lambda i: _rms_norm(x[i] + residual[i], weight)},
        sets=3, target=TARGET, work=Work("copy", 4 * size),
    )  # fmt: skip
    gated = repeated(lambda: normal(TOKENS, 2 * WIDTH, dtype=dtype), 2)
    yield Case(
        "silu_and_mul", f"{TOKENS} × 2·{WIDTH}", "bfloat16", lambda i: ops.silu_and_mul(gated[i]),
        {"torch": lambda i: F.silu(gated[i][:, :WIDTH]) * gated[i][:, WIDTH:]},
        sets=2, target=TARGET, work=Work("copy", 3 * size),
    )  # fmt: skip
    q = repeated(lambda: normal(TOKENS, HEADS, HEAD_DIM, dtype=dtype), 3)
    k = repeated(lambda: normal(TOKENS, KV_HEADS, HEAD_DIM, dtype=dtype), 3)
    positions = torch.arange(TOKENS)
    angles = positions[:, None] / 10000 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    cos, sin = angles.cos(), angles.sin()
    yield Case(
        "rotary_embedding", f"{TOKENS} × {HEADS} + {KV_HEADS} heads of {HEAD_DIM}", "bfloat16",
        lambda i: ops.rotary_embedding(q[i], k[i], positions, cos, sin),
        {"torch": lambda i: (_rotate(q[i], positions, cos, sin), _rotate(k[i], positions, cos, sin))},
        sets=3, target=TARGET, work=Work("copy", 2 * (q[0].nbytes + k[0].nbytes)),
    )  # fmt: skip


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As models write it, where torch has a fused one the faster."""
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers does it, in the activations' dtype."""
    c, s = (torch.cat([t, t], -1).to(x.dtype)[positions].unsqueeze(1) for t in (cos, sin))
    half = x.shape[-1] // 2
    return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s
