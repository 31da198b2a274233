"""8-bit float rows with one scale each (OCP 8-bit Floating Point Specification, E4M3)."""

from __future__ import annotations

import itertools
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
        codes = torch.empty(dense.shape, dtype=self.code_dtype, device=dense.device)
        absmax = torch.empty(dense.shape[:-1], dtype=torch.float32, device=dense.device)
        # One matrix after the other: in float32, a stack of experts would take several times what it takes itself.
        for index in itertools.product(*map(range, dense.shape[:-2])):
            wide = dense[index].float()
            largest = wide.abs().amax(-1) if wide.numel() else absmax[index].zero_()
            absmax[index] = largest
            codes[index] = self._scaled(wide, largest.unsqueeze(-1)).to(self.code_dtype)
        return codes, absmax

    def _scaled(self, wide: Tensor, row: Tensor) -> Tensor:
        factor = self.peak / row
        # Dividing first where the factor is more than float32 holds; a row of zeros has codes of zero.
        scaled = torch.where(torch.isfinite(factor), wide * factor, wide / torch.where(row > 0, row, 1.0) * self.peak)
        return scaled.clamp_(-self.peak, self.peak)

    def linear(self, x_TK: Tensor, resolved: Components, shape: Sequence[int], bias: Tensor | None, layout: str) -> Tensor:
        return ops.gemm(x_TK, self.dequantize(resolved, shape, x_TK.dtype), bias=bias)

    @property
    def prepack_arguments(self) -> Mapping[str, Any]:
        return {"format": "fp8"}
