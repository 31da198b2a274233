"""What formats of one byte an element and one scale a row share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from q_core.formats.weight_format import Components, WeightFormat


class ScaledRows(WeightFormat):
    """One code an element and one float32 scale a row, the last axis: ``w ≈ codes * absmax / peak``.

    The components are ``codes`` [..., N, K] and ``absmax`` float32 [..., N]. A stack of matrices, such as the experts of a layer, is
    held like one of all their rows.
    """

    __slots__ = ()

    code_dtype: ClassVar[torch.dtype]
    peak: ClassVar[float]
    """The code of an element as large as absmax."""

    @property
    def component_names(self) -> tuple[str, ...]:
        return ("codes", "absmax")

    @abstractmethod
    def encode(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and absmax of rows [..., N, K]."""

    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        self._check_axes(dense.shape)
        codes, absmax = self.encode(dense)
        return {"codes": codes, "absmax": absmax}

    def empty(self, shape: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
        self._check_axes(shape)
        return {
            "codes": torch.empty(tuple(shape), dtype=self.code_dtype, device=device),
            "absmax": torch.empty(tuple(shape[:-1]), dtype=torch.float32, device=device),
        }

    def dequantize(self, resolved: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._decode(resolved["codes"], resolved["absmax"], dtype).view(tuple(shape))

    def embedding(self, ids: Tensor, components: Components, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        rows = ids.reshape(-1)  # index_select refuses what is no row; an index in brackets takes -1 for the last
        decoded = self._decode(components["codes"].index_select(0, rows), components["absmax"].index_select(0, rows), dtype)
        return decoded.view(*ids.shape, *shape[1:])

    def check_cut(self, shape: Sequence[int], row: int) -> None:
        if len(shape) < 2:
            raise ValueError(f"a weight of scaled rows seen as {list(shape)} has no rows to cut, expected two axes [N, K]")

    def rows(self, resolved: Components, shape: Sequence[int], start: int, stop: int) -> tuple[Self, dict[str, Tensor]]:
        self.check_cut(shape, start)
        return self, {"codes": resolved["codes"][start:stop], "absmax": resolved["absmax"][start:stop]}

    def _check_axes(self, shape: Sequence[int]) -> None:
        if len(shape) < 2:
            raise ValueError(
                f"{type(self).__name__}: the weight has shape {list(shape)}, expected two axes [N, K], or a stack of such"
            )

    def _decode(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        # A row without a finite scale has all codes 0 and decodes to NaN, as the ops promise: 0 * inf and 0 * nan.
        return (codes.float() * (absmax / self.peak).unsqueeze(-1)).to(dtype)
