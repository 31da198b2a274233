"""8-bit float rows with one scale each (OCP 8-bit Floating Point Specification, E4M3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from q_core import ops
from q_core.formats.scaled_rows import ScaledRows
from q_core.formats.weight_format import Components


@dataclass(frozen=True, slots=True)
class Fp8Rows(ScaledRows):
    """One E4M3 code an element and one float32 scale a row: ``w ≈ codes * absmax / 448``.

    The components are ``codes`` float8_e4m3fn [N, K] and ``absmax`` float32 [N]; of a stack of matrices float8_e4m3fn [..., N, K] and
    float32 [..., N]. The product that reads it as it is is that of experts, :func:`q_core.ops.fused_moe`; a linear layer decodes it first.
    """

    code_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    peak: ClassVar[float] = 448.0

    def encode(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        wide = dense.float()
        absmax = wide.abs().amax(-1) if dense.shape[-1] else wide.new_zeros(dense.shape[:-1])
        row = absmax.unsqueeze(-1)
        factor = self.peak / row
        # Dividing first where the factor is more than float32 holds; a row of zeros has codes of zero.
        scaled = torch.where(torch.isfinite(factor), wide * factor, wide / torch.where(row > 0, row, 1.0) * self.peak)
        return scaled.clamp(-self.peak, self.peak).to(self.code_dtype), absmax

    def linear(self, x_TK: Tensor, resolved: Components, shape: Sequence[int], bias: Tensor | None, layout: str) -> Tensor:
        return ops.gemm(x_TK, self.dequantize(resolved, shape, x_TK.dtype), bias=bias)

    @property
    def prepack_arguments(self) -> Mapping[str, Any]:
        return {"format": "fp8"}
