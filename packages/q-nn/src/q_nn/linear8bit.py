"""Linear layers of LLM.int8() (arXiv 2208.07339)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor, held_components
from q_core.formats.sharding import local_shard
from q_core.formats.weight_format import WeightFormat
from q_nn.int8_matmul import int8_matmul, int8_matmul_dense
from q_nn.linear import QuantizedLinear
from q_nn.state_hooks import install


class Linear8bitLt(QuantizedLinear):
    """A linear layer with int8 weight rows, one scale each, whose input is rounded to int8 too: LLM.int8() (arXiv 2208.07339).

    Rows of the input are quantized on the way in, and the products are summed exactly in int32. With a ``threshold``, columns of the
    input that have any element of that size or more are left out of it, and multiplied in the input's dtype: a few large columns would
    otherwise take the resolution from all others. The gradient of the input goes through the decoded weight, as if the input had not been
    rounded.

    A threshold costs a look at the input, up to a tenth of the product's time, for which an accelerator is waited for once a forward. What
    outliers cost is mostly the weight's columns, a byte a row: six of 4096 take a quarter more for one token, up to 90 % for 2 to 32, under
    a fifth from 64 on (4096 × 4096, one core, q-cpu 0.1). To compilers the product is one operator, which CUDA graphs leave out.

    Args:
        in_features, out_features: sizes of input and output.
        bias: whether there is a bias; it is not quantized.
        device, dtype: of the weight before it is quantized, and of the bias.
        threshold: size from which an element of the input is an outlier; 0 for none. 6.0 is the paper's, and what Hugging Face's models
            are loaded with.
        has_fp16_weights: keep the weight dense, in ``dtype``, and train it: it is quantized anew in each forward, the gradients are those
            of the dense product, and columns that meet outliers are taken as they are. Its state dict is that of ``nn.Linear``.
    """

    holds = Int8Rows
    _threshold = 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        threshold: float = 0.0,
        has_fp16_weights: bool = False,
    ) -> None:
        if has_fp16_weights:
            nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
            install(self)
        else:
            super().__init__(in_features, out_features, bias, device, dtype, format=Int8Rows())
        self.threshold = threshold

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, threshold: float = 0.0, has_fp16_weights: bool = False) -> Self:
        """Quantize the weight of a linear layer, or share it if it is to stay dense; the bias is shared.

        Raises:
            ValueError: the weight has an element that is not finite, or ``threshold`` is no number of 0 or more.
        """
        if has_fp16_weights:
            shape = linear.in_features, linear.out_features
            layer = cls(*shape, False, device="meta", threshold=threshold, has_fp16_weights=True)
            layer.weight, layer.bias = linear.weight, linear.bias
            return layer.train(linear.training)
        layer = cls._around(linear, QuantizedTensor.quantize(linear.weight, Int8Rows()))
        layer.threshold = threshold
        return layer

    @property
    def threshold(self) -> float:
        """Size from which an element of the input is an outlier; 0 for no outliers."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._threshold = check_threshold("Linear8bitLt: threshold", threshold)

    @property
    def has_fp16_weights(self) -> bool:
        """Whether the weight is dense, and trains."""
        return local_shard(self.weight) is None

    def accepts_format(self, format: WeightFormat) -> bool:
        # What is there to be trained isn't replaced by what can't be.
        return super().accepts_format(format) and not self.has_fp16_weights

    def extra_repr(self) -> str:
        """What ``nn.Linear`` shows, the format, and how outliers are met."""
        held = f"{nn.Linear.extra_repr(self)}, has_fp16_weights=True" if self.has_fp16_weights else super().extra_repr()
        return f"{held}, threshold={self.threshold}"

    def forward(self, input: Tensor) -> Tensor:
        weight: Any = self.weight
        if not isinstance(weight, QuantizedTensor):
            return int8_matmul_dense(input, weight, self.bias, threshold=self._threshold)
        held = held_components(weight)
        return int8_matmul(
            input, held["codes"], held["absmax"], self.bias, threshold=self._threshold, layout=weight.component_layout
        )


def check_threshold(what: str, threshold: object) -> float:
    """Refuse what can't be LLM.int8()'s threshold."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < float("inf"):
        raise ValueError(f"{what} is {threshold!r}, expected 0 for no outliers or a positive number, such as 6.0")
    return float(threshold)
