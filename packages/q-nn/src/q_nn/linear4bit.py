"""Linear layers whose weight is held in four bits."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from q_core.formats.codebooks import FourBitType
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn.linear import QuantizedLinear
from q_nn.quantized_module import FourBitModule


class Linear4bit(FourBitModule, QuantizedLinear):
    """A linear layer with a 4-bit weight (QLoRA, arXiv 2305.14314).

    It starts with a random weight, quantized at once; a state dict with a dense weight is quantized as it is loaded, one in the flat layout
    (:mod:`q_core.formats.checkpoint`) is taken as it is, with its own type and blocksize.

    Args:
        in_features, out_features: sizes of input and output.
        bias: whether there is a bias; it is not quantized.
        device, dtype: of the weight before it is quantized, and of the bias. With device "meta" nothing is allocated or quantized.
        quant_type: "nf4" (the default), "fp4", "int4", "mxfp4" or "nvfp4".
        blocksize: elements a scale: a power of two in 32…4096, 64 by default; always 32 for "mxfp4" and 16 for "nvfp4".
        double_quant: quantize the scales too: 4.127 bits a weight at blocksize 64, and not 4.5; by default where scales are float32. Those
            of "mxfp4" (4.25 bits) and "nvfp4" (4.5) are a byte each already, and refuse it. Scales that have to be decoded are kept decoded
            between forwards without gradients, see :func:`q_core.formats.quantized_tensor.resolve`.

    Raises:
        ValueError: the type is unknown, or doesn't have that blocksize or double quantization.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: FourBitType | None = None,
        blocksize: int | None = None,
        double_quant: bool | None = None,
    ) -> None:
        format = self._format(quant_type, blocksize, double_quant)
        super().__init__(in_features, out_features, bias, device, dtype, format=format)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: FourBitType | None = None,
        blocksize: int | None = None,
        double_quant: bool | None = None,
    ) -> Self:
        """Quantize the weight of a linear layer; the bias is shared with it.

        Raises:
            ValueError: the weight has an element that is not finite, or the settings are wrong.
        """
        format = cls._format(quant_type, blocksize, double_quant)
        return cls._around(linear, QuantizedTensor.quantize(linear.weight, format))


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` in 4-bit NormalFloat: code-book entries at the quantiles of a normal distribution."""

    fixed_type = "nf4"


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` in bitsandbytes' FP4: sign, two bits of exponent, one of mantissa."""

    fixed_type = "fp4"
