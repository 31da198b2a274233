"""Muon (https://kellerjordan.github.io/posts/muon/): momentum made orthogonal, for the matrices of hidden layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from q_optim import checks
from q_optim.arguments import StorageArguments
from q_optim.optimizer import BlockwiseOptimizer
from q_optim.segment import Segment
from q_optim.storage import Storage

AdjustLr = Literal["original", "match_rms_adamw"]
_MOST_ITERATIONS = 100


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """A matrix [M, N] with its singular values brought near 1 by Newton and Schulz's iteration, in bfloat16.

    The quintic's slope at zero is as steep as can be, so a few iterations do; the values end in about 0.7…1.2, which serves as well.
    """
    a, b, c = coefficients
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


@dataclass(frozen=True, slots=True)
class MuonUpdate:
    """``m = momentum m + (1 - momentum) g``; the parameter decays, then loses the orthogonalized m (or, nesterov, what comes next)."""

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    ns_steps: int
    eps: float
    adjust_lr_fn: AdjustLr | None

    @property
    def states(self) -> tuple[str, ...]:
        return ("state1",)

    @property
    def whole(self) -> bool:
        return True

    def __call__(self, segments: Sequence[Segment], storage: Storage) -> None:
        for segment in segments:
            self._step(segment, storage)

    def _step(self, segment: Segment, storage: Storage) -> None:
        segment = segment.flat()
        keep = segment.grad.isfinite().all()
        grad = segment.grad.float()
        momentum = storage.decode(segment, "state1").lerp(grad, 1 - self.momentum)
        direction = grad.lerp(momentum, self.momentum) if self.nesterov else momentum
        update = orthogonalized(direction.view(segment.shape), self.ns_coefficients, self.ns_steps, self.eps).reshape(-1)
        decayed = segment.param.float() * (1 - self.lr * self.weight_decay)
        moved = torch.add(decayed, update, alpha=-self._adjusted_lr(segment.shape))
        segment.param.copy_(torch.where(keep, moved, segment.param))
        storage.encode(segment, "state1", momentum, keep.expand(grad.shape))
        segment.skipped.add_((~keep) * grad.numel())

    def _adjusted_lr(self, shape: torch.Size) -> float:
        rows, columns = shape
        if self.adjust_lr_fn == "match_rms_adamw":
            return self.lr * 0.2 * math.sqrt(max(rows, columns))
        return self.lr * math.sqrt(max(1, rows / columns))


class Muon(BlockwiseOptimizer):
    """Muon with its momentum in 32 bits, or with ``optim_bits=8`` in 8. The update is that of ``torch.optim.Muon``.

    For the matrices of hidden layers; embeddings, heads, norms and biases want another optimizer. A sharded parameter is gathered for
    its step.

    Args:
        params: matrices, or groups of them, as torch optimizers take them.
        lr: learning rate.
        weight_decay: decoupled decay, a share of ``lr``.
        momentum: decay of the first moment.
        nesterov: look a step ahead.
        ns_coefficients: of the iteration's quintic.
        eps: least norm that is divided by.
        ns_steps: iterations, fewer than 100.
        adjust_lr_fn: how ``lr`` follows the shape: "original" (and ``None``) times sqrt(max(1, rows / columns)), or "match_rms_adamw"
            times 0.2 sqrt(max(rows, columns)), so that lr and decay tuned for AdamW can be kept.
        **storage: see :class:`q_optim.StorageArguments`.

    Raises:
        ValueError, TypeError: a setting or a parameter is not as above; the message names it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        **storage: Unpack[StorageArguments],
    ) -> None:
        settings = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, settings, storage)

    def check_group(self, what: str, group: dict[str, Any]) -> None:
        super().check_group(what, group)
        checks.number(what, "eps", group["eps"])
        checks.number(what, "momentum", group["momentum"], below=1)
        checks.flag(what, "nesterov", group["nesterov"])
        coefficients = group["ns_coefficients"]
        if not isinstance(coefficients, (tuple, list)) or len(coefficients) != 3:
            raise ValueError(f"{what}: ns_coefficients is {coefficients!r}, expected three numbers")
        checks.count(what, "ns_steps", group["ns_steps"])
        if group["ns_steps"] >= _MOST_ITERATIONS:
            raise ValueError(f"{what}: ns_steps is {group['ns_steps']}, expected 0…{_MOST_ITERATIONS - 1}")
        if group["adjust_lr_fn"] not in (None, *get_args(AdjustLr)):
            raise ValueError(f"{what}: adjust_lr_fn is {group['adjust_lr_fn']!r}, expected None or one of {get_args(AdjustLr)}")

    def check_parameter(self, what: str, param: Tensor) -> None:
        super().check_parameter(what, param)
        if param.dim() != 2:
            raise ValueError(f"{what} has shape {list(param.shape)}, expected a matrix; give it to another optimizer")

    def update(self, group: dict[str, Any], step: int) -> MuonUpdate:
        return MuonUpdate(
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=tuple(group["ns_coefficients"]),
            ns_steps=group["ns_steps"],
            eps=group["eps"],
            adjust_lr_fn=group["adjust_lr_fn"],
        )


class Muon8bit(Muon):
    """:class:`Muon` with its momentum in 8 bits."""

    default_bits = 8


class PagedMuon(Muon):
    """:class:`Muon` with a paged momentum."""

    default_paged = True


class PagedMuon8bit(Muon8bit):
    """:class:`Muon` with a paged momentum in 8 bits."""

    default_paged = True
