"""What stands between the products of a decoder layer, beside torch's composition of it, held against copying."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Target, Work
from benchmarks.gpu_cases.sizes import Sizes, agrees
from benchmarks.gpu_clock import sets_for
from q_core import ops
from q_core.reference import norm as reference

GATE, STRETCH = Target(fraction=0.85), Target(fraction=0.92)
EPS = 1e-6
bf16 = torch.bfloat16


def cases(sizes: Sizes) -> Iterator[Case]:
    count = sets_for(2 * sizes.rows * sizes.width)
    x = [sizes.normal(sizes.rows, sizes.width) for _ in range(count)]
    weight = sizes.normal(sizes.width)
    shape, half, size = f"{sizes.rows} × {sizes.width}", sizes.width // 2, x[0].nbytes

    def other(i: int) -> Tensor:
        return x[(i + 1) % count]

    yield Case(
        "rms_norm", shape, "bfloat16", lambda i: ops.rms_norm(x[i], weight, eps=EPS),
        {"torch": lambda i: F.rms_norm(x[i], (sizes.width,), weight, EPS)},
        sets=count, target=GATE, stretch=STRETCH, work=Work("copy", 2 * size),
        check=agrees(
            lambda: ops.rms_norm(x[0], weight, eps=EPS), lambda: reference.rms_norm(x[0].double(), weight.double(), EPS), bf16
        ),
    )  # fmt: skip
    yield Case(
        "add_rms_norm", shape, "bfloat16", lambda i: ops.add_rms_norm(x[i], other(i), weight, eps=EPS),
        {"torch": lambda i: F.rms_norm(x[i] + other(i), (sizes.width,), weight, EPS)},
        sets=count, target=GATE, stretch=STRETCH, work=Work("copy", 4 * size),
        check=agrees(
            lambda: ops.add_rms_norm(x[0], other(0), weight, eps=EPS),
            lambda: reference.add_rms_norm(x[0].double(), other(0).double(), weight.double(), EPS),
            bf16,
        ),
    )  # fmt: skip
    yield Case(
        "silu_and_mul", f"{sizes.rows} × 2·{half}", "bfloat16", lambda i: ops.silu_and_mul(x[i]),
        {"torch": lambda i: F.silu(x[i][:, :half]) * x[i][:, half:]},
        sets=count, target=GATE, stretch=STRETCH, work=Work("copy", size + size // 2),
        check=agrees(lambda: ops.silu_and_mul(x[0]), lambda: reference.silu_and_mul(x[0].double()), bf16),
    )  # fmt: skip
    yield _rotary(sizes)


def _rotary(sizes: Sizes) -> Case:
    H, G, D = sizes.heads
    T = sizes.rows * sizes.width // ((H + G) * D)
    count = sets_for(2 * T * (H + G) * D)
    q = [sizes.normal(T, H, D) for _ in range(count)]
    k = [sizes.normal(T, G, D) for _ in range(count)]
    positions = torch.arange(T, device=sizes.device)
    angles = positions[:, None] / 10000 ** (torch.arange(D // 2, device=sizes.device) / (D // 2))
    cos, sin = angles.cos(), angles.sin()

    def exact() -> tuple[Tensor, ...]:
        return reference.rotary_embedding(q[0].double(), k[0].double(), positions, cos, sin, False)

    return Case(
        "rotary_embedding", f"{T} × {H} + {G} heads of {D}", "bfloat16",
        lambda i: ops.rotary_embedding(q[i], k[i], positions, cos, sin),
        {"torch": lambda i: (_rotate(q[i], positions, cos, sin), _rotate(k[i], positions, cos, sin))},
        sets=count, target=GATE, stretch=STRETCH, work=Work("copy", 2 * (q[0].nbytes + k[0].nbytes)),
        check=agrees(lambda: ops.rotary_embedding(q[0], k[0], positions, cos, sin), exact, bf16),
    )  # fmt: skip


def _rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers does it, in the activations' dtype."""
    c, s = (torch.cat([t, t], -1).to(x.dtype)[positions].unsqueeze(1) for t in (cos, sin))
    half = x.shape[-1] // 2
    return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s
