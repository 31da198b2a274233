"""Linear layers whose weight alone is held in int8."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.linear import QuantizedLinear


class LinearInt8(QuantizedLinear):
    """A linear layer with int8 weight rows, one scale each, and the input as it is: weight-only int8, or W8A16.

    The weight and its state dict are those of :class:`q_nn.Linear8bitLt`, which rounds the input to int8 as well: that is faster for many
    tokens, and less exact. A token or a few at a time, where the weight's bytes are what takes time, it isn't.

    Args:
        in_features, out_features: sizes of input and output.
        bias: whether there is a bias; it is not quantized.
        device, dtype: of the weight before it is quantized, and of the bias. With device "meta" nothing is allocated or quantized.
    """

    holds = Int8Rows

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, format=Int8Rows())

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """Quantize the weight of a linear layer; the bias is shared with it, and so is a weight that is int8 rows already.

        Raises:
            ValueError: the weight has an element that is not finite.
        """
        weight: Tensor = linear.weight
        if not (isinstance(weight, QuantizedTensor) and weight.format == Int8Rows()):
            weight = QuantizedTensor.quantize(weight, Int8Rows())
        return cls._around(linear, weight)
