"""Int8 rows with one scale each: the weight format of LLM.int8() (arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q_core import ops
from q_core.formats.weight_format import Components, WeightFormat


@dataclass(frozen=True, slots=True)
class Int8Rows(WeightFormat):
    """One int8 code an element and one float32 scale a row: ``w ≈ codes * absmax / 127``.

    The components are ``codes`` int8 [N, K] and ``absmax`` float32 [N].
    """

    @property
    def component_names(self) -> tuple[str, ...]:
        return ("codes", "absmax")

    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        if dense.ndim != 2:
            raise ValueError(f"Int8Rows.quantize: the weight has shape {list(dense.shape)}, expected two axes [N, K]")
        codes, absmax, _ = ops.quantize_int8_rowwise(dense)
        return {"codes": codes, "absmax": absmax}

    def empty(self, shape: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        if len(shape) != 2:
            raise ValueError(f"Int8Rows: the weight has shape {list(shape)}, expected two axes [N, K]")
        return {
            "codes": torch.empty(tuple(shape), dtype=torch.int8, device=device),
            "absmax": torch.empty(shape[0], dtype=torch.float32, device=device),
        }

    def dequantize(self, resolved: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _decode(resolved["codes"], resolved["absmax"], dtype).view(tuple(shape))

    def linear(self, x_TK: Tensor, resolved: Components, shape: Sequence[int], bias: Tensor | None, layout: str) -> Tensor:
        return ops.gemm_int8_weight(x_TK, resolved["codes"], resolved["absmax"], bias=bias, layout=layout)

    def embedding(self, ids: Tensor, components: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        rows = ids.reshape(-1)  # index_select refuses what is no row; an index in brackets takes -1 for the last
        decoded = _decode(components["codes"].index_select(0, rows), components["absmax"].index_select(0, rows), dtype)
        return decoded.view(*ids.shape, shape[1])

    @property
    def prepack_arguments(self) -> Mapping[str, Any]:
        return {"format": "int8"}

    def check_cut(self, shape: Sequence[int], row: int) -> None:
        if len(shape) != 2:
            raise ValueError(f"an int8 weight seen as {list(shape)} has no rows to cut, expected two axes [N, K]")

    def rows(self, resolved: Components, shape: Sequence[int], start: int, stop: int) -> tuple[Int8Rows, dict[str, Tensor]]:
        self.check_cut(shape, start)
        return self, {"codes": resolved["codes"][start:stop], "absmax": resolved["absmax"][start:stop]}


def _decode(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    # A row without a finite scale has all codes 0 and decodes to NaN, as the ops promise: 0 * inf and 0 * nan.
    return (codes.float() * (absmax / 127).unsqueeze(-1)).to(dtype)
