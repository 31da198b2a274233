"""Int8 rows with one scale each: the weight format of LLM.int8() (arXiv 2208.07339)."""

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
class Int8Rows(ScaledRows):
    """One int8 code an element and one float32 scale a row: ``w ≈ codes * absmax / 127``.

    The components are ``codes`` int8 [N, K] and ``absmax`` float32 [N]; of a stack of matrices int8 [..., N, K] and float32 [..., N].
    """

    code_dtype: ClassVar[torch.dtype] = torch.int8
    peak: ClassVar[float] = 127.0

    def encode(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax, _ = ops.quantize_int8_rowwise(dense)
        return codes, absmax

    def linear(self, x_TK: Tensor, resolved: Components, shape: Sequence[int], bias: Tensor | None, layout: str) -> Tensor:
        return ops.gemm_int8_weight(x_TK, resolved["codes"], resolved["absmax"], bias=bias, layout=layout)

    @property
    def prepack_arguments(self) -> Mapping[str, Any]:
        return {"format": "int8"}
