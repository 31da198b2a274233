"""Linear layers whose weight is quantized."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from q_core.formats.codebooks import FourBitType
from q_core.formats.four_bit import NESTED_BLOCKSIZE, FourBit
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.quantized_tensor import linear as product
from q_core.formats.sharding import local_shard
from q_core.formats.weight_format import WeightFormat
from q_nn.state_hooks import install


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` with a :class:`QuantizedTensor` as its weight; see the subclasses.

    The weight is frozen; gradients flow through it to the input, and to the bias.
    """

    holds: ClassVar[type[WeightFormat]]
    """The kind of format that a subclass takes."""

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

    def _hold(self, weight: QuantizedTensor) -> None:
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        install(self)

    def accepts_format(self, format: WeightFormat) -> bool:
        """Whether a checkpoint's weight in that format may be loaded."""
        return isinstance(format, self.holds)

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

    def extra_repr(self) -> str:
        """What ``nn.Linear`` shows, and the format."""
        return f"{super().extra_repr()}, format={_quantized(self).format}"

    def _bias_for(self, dtype: torch.dtype) -> Tensor | None:
        """The bias as the ops want it: of the activations' dtype, which needn't be the one the layer was made with."""
        bias = self.bias
        return bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply: [..., in_features] of float32, bfloat16 or float16 to [..., out_features] of the same dtype."""
        # Not F.linear: going through the tensor subclass, and asking it for its shape, costs more than the op's own dispatch.
        weight: Any = self.weight
        return product(input, weight, (self.out_features, self.in_features), self._bias_for(input.dtype))


class Linear4bit(QuantizedLinear):
    """A linear layer with a 4-bit weight (QLoRA, arXiv 2305.14314).

    It starts with a random weight, quantized at once; a state dict with a dense weight is quantized as it is loaded, one in
    bitsandbytes' layout is taken as it is, with its own blocksize.

    Args:
        in_features, out_features: sizes of input and output.
        bias: whether there is a bias; it is not quantized.
        device, dtype: of the weight before it is quantized, and of the bias. With device "meta" nothing is allocated or quantized.
        quant_type: "nf4" or "fp4".
        blocksize: elements a scale, a power of two in 32…4096.
        double_quant: quantize the scales too: 4.127 bits a weight at blocksize 64, and not 4.5. Decoded scales are kept between forwards
            without gradients, see :func:`q_core.formats.quantized_tensor.resolve`.
    """

    holds = FourBit

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: FourBitType = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> None:
        format = _four_bit(quant_type, blocksize, double_quant)
        super().__init__(in_features, out_features, bias, device, dtype, format=format)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, quant_type: FourBitType = "nf4", blocksize: int = 64, double_quant: bool = True
    ) -> Self:
        """Quantize the weight of a linear layer; the bias is shared with it.

        Raises:
            ValueError: the weight has an element that is not finite.
        """
        return cls._around(linear, QuantizedTensor.quantize(linear.weight, _four_bit(quant_type, blocksize, double_quant)))


class _FixedType(Linear4bit):
    """A :class:`Linear4bit` that says its type in its name."""

    quant_type: ClassVar[FourBitType]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            device,
            dtype,
            quant_type=self.quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, blocksize: int = 64, double_quant: bool = True) -> Self:  # type: ignore[override]
        """:meth:`Linear4bit.from_linear` with the type of this class."""
        return cls._around(linear, QuantizedTensor.quantize(linear.weight, _four_bit(cls.quant_type, blocksize, double_quant)))

    def accepts_format(self, format: WeightFormat) -> bool:
        return isinstance(format, FourBit) and format.quant_type == self.quant_type


class LinearNF4(_FixedType):
    """:class:`Linear4bit` in 4-bit NormalFloat: code-book entries at the quantiles of a normal distribution."""

    quant_type: ClassVar[Literal["nf4"]] = "nf4"


class LinearFP4(_FixedType):
    """:class:`Linear4bit` in bitsandbytes' FP4: sign, two bits of exponent, one of mantissa."""

    quant_type: ClassVar[Literal["fp4"]] = "fp4"


def _four_bit(quant_type: FourBitType, blocksize: int, double_quant: bool) -> FourBit:
    return FourBit(quant_type, blocksize, NESTED_BLOCKSIZE if double_quant else None)


def _quantized(layer: nn.Linear) -> QuantizedTensor:
    weight = local_shard(layer.weight)
    assert weight is not None
    return weight
