"""Linear layers of LLM.int8() (arXiv 2208.07339)."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor, held_components
from q_nn.int8_matmul import int8_matmul
from q_nn.linear import QuantizedLinear

Activations = Literal["int8", "native"]


class Linear8bitLt(QuantizedLinear):
    """A linear layer with int8 weight rows, one scale each: LLM.int8() (arXiv 2208.07339) without outlier columns.

    Rows of the input are quantized on the way in, and the products are summed exactly in int32. The gradient of the input goes through
    the decoded weight, as if the input had not been rounded.

    Args:
        in_features, out_features: sizes of input and output.
        bias: whether there is a bias; it is not quantized.
        device, dtype: of the weight before it is quantized, and of the bias.
        activations: "int8" as above, or "native": the input isn't rounded, which is slower and nearer to the original layer.
    """

    holds = Int8Rows

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activations: Activations = "int8",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, format=Int8Rows())
        self.activations = activations

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, activations: Activations = "int8") -> Self:
        """Quantize the weight of a linear layer; the bias is shared with it.

        Raises:
            ValueError: the weight has an element that is not finite.
        """
        layer = cls._around(linear, QuantizedTensor.quantize(linear.weight, Int8Rows()))
        layer.activations = activations
        return layer

    @property
    def activations(self) -> Activations:
        """How the input takes part in the product."""
        return self._activations

    @activations.setter
    def activations(self, activations: Activations) -> None:
        if activations not in get_args(Activations):
            raise ValueError(f"Linear8bitLt: activations is {activations!r}, expected one of {get_args(Activations)}")
        self._activations = activations

    def _hold(self, weight: QuantizedTensor) -> None:
        super()._hold(weight)
        self.activations = "int8"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activations={self.activations!r}"

    def forward(self, input: Tensor) -> Tensor:
        if self._activations == "native":
            return super().forward(input)
        weight: Any = self.weight
        held = held_components(weight)
        return int8_matmul(input, held["codes"], held["absmax"], self.bias, weight.component_layout)
