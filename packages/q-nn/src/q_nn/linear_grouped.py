"""The linear layer for weights in groups of integers."""

from __future__ import annotations

import torch

from q_core.formats.grouped_int import AffineGroups, GroupedInt
from q_nn.linear import QuantizedLinear


class LinearGroupedInt(QuantizedLinear):
    """A linear layer with integers of 4 or 8 bits in groups of columns, as GPTQ, AWQ, compressed-tensors and GGUF have them.

    Made by the readers of their checkpoints (:mod:`q_nn.readers`); one that is made here starts with a random weight, rounded to the
    nearest. Products are computed in float32 and rounded once to the input's dtype.

    Args:
        in_features, out_features: sizes of input and output.
        bias: whether there is a bias; it is not quantized.
        device, dtype: of the weight before it is quantized, and of the bias.
        format: how the weight is held.
    """

    holds = GroupedInt

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: AffineGroups = AffineGroups(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, format=format)
