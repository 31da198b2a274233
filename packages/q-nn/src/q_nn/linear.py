"""Linear layers whose weight is quantized."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor, held_components
from q_core.formats.quantized_tensor import linear as product
from q_core.formats.weight_format import WeightFormat
from q_nn.int8_matmul import int8_matmul
from q_nn.quantized_module import QuantizedModule

Activations = Literal["int8", "native"]


class QuantizedLinear(QuantizedModule, nn.Linear):
    """``nn.Linear`` with a :class:`QuantizedTensor` as its weight; see the subclasses.

    The weight is frozen; gradients flow through it to the input, and to the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: WeightFormat,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._hold(QuantizedTensor.quantize(self.weight.detach(), format))

    @classmethod
    def _around(cls, linear: nn.Linear, weight: QuantizedTensor) -> Self:
        """A layer with this weight and the rest of ``linear``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer._hold(weight)
        layer.register_parameter("bias", linear.bias)
        layer.train(linear.training)
        return layer

    def reset_parameters(self) -> None:
        """Draw a new random weight, as ``nn.Linear`` does, and quantize it."""
        weight = getattr(self, "weight", None)
        if not isinstance(weight, QuantizedTensor):
            super().reset_parameters()
            return
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            weight.copy_(dense.weight)
            if self.bias is not None:
                self.bias.copy_(dense.bias)

    def _bias_for(self, dtype: torch.dtype) -> Tensor | None:
        """The bias as the ops want it: of the activations' dtype, which needn't be the one the layer was made with."""
        bias = self.bias
        return bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply: [..., in_features] of float32, bfloat16 or float16 to [..., out_features] of the same dtype."""
        # Not F.linear: going through the tensor subclass, and asking it for its shape, costs more than the op's own dispatch.
        weight: Any = self.weight
        return product(input, weight, (self.out_features, self.in_features), self._bias_for(input.dtype))


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
