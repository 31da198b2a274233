"""Linear layers whose weight is quantized."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.quantized_tensor import linear as product
from q_core.formats.weight_format import WeightFormat
from q_nn.quantized_module import QuantizedModule


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
