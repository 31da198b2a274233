"""A quantized layer for outlier columns that are known in advance, and how to get to know them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_nn.layers import around
from q_nn.linear import QuantizedLinear
from q_nn.linear8bit import check_threshold


class OutlierAwareLinear(nn.Module):
    """A quantized linear layer beside a few columns of its weight that stay dense: ``base(x without them) + x[columns] @ dense.T``.

    For outliers that are always in the same columns, as large language models have them. Against a ``threshold`` of
    :class:`Linear8bitLt` the columns' weights aren't rounded, no values are looked at, so that no device is waited for and CUDA graphs
    can hold it, and any format may be the base's; what is large elsewhere isn't caught.

    Attributes:
        base: the quantized layer, zero in those columns. Adapters may stand beside it; they don't see the columns.
        outlier_columns: int64 [C], a buffer.
        outlier_weight: the weight's columns [N, C], frozen; ``requires_grad_`` lets them train.
    """

    outlier_columns: Tensor

    def __init__(self, base: QuantizedLinear, outlier_columns: Tensor, outlier_weight: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("outlier_columns", outlier_columns)
        self.outlier_weight = nn.Parameter(outlier_weight, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, outlier_columns: Tensor | Sequence[int], *, format: WeightFormat | None = None) -> Self:
        """Quantize the weight of a linear layer but for some columns; the bias is shared with it.

        Args:
            linear: its weight is dense.
            outlier_columns: which columns, as bool [K] (such as :func:`observe_outliers` gives) or as numbers, each once.
            format: of the rest; ``Int8Rows()`` by default, whose layer rounds activations too.

        Raises:
            ValueError: the weight has an element that is not finite, or a column isn't there, or named twice.
            TypeError: the weight is quantized already, or columns aren't named as above.
        """
        weight = linear.weight.detach()
        if isinstance(weight, QuantizedTensor):
            raise TypeError("OutlierAwareLinear.from_linear: the weight is quantized already, expected a dense one")
        columns = _numbers(outlier_columns, linear.in_features).to(weight.device)
        rest = QuantizedTensor.quantize(weight.index_fill(1, columns, 0), format or Int8Rows())
        layer = cls(around(linear, rest), columns, weight.index_select(1, columns))
        return layer.train(linear.training)

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.base.out_features

    def extra_repr(self) -> str:
        """How many columns are dense."""
        return f"outlier_columns={self.outlier_columns.numel()}"

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] of float32, bfloat16 or float16 to [..., out_features] of the same dtype."""
        output: Tensor = self.base(input.index_fill(-1, self.outlier_columns, 0))
        outliers = input.index_select(-1, self.outlier_columns).to(output.dtype)
        return output + F.linear(outliers, self.outlier_weight.to(output.dtype))


@contextmanager
def observe_outliers(model: nn.Module, *, threshold: float = 6.0) -> Iterator[dict[str, Tensor]]:
    """Note which columns of linear layers' inputs have outliers in what the model is called with inside the ``with`` block.

    Args:
        model: its forwards are watched; layers that aren't called don't appear.
        threshold: size from which an element is an outlier, above 0.

    Yields:
        For each ``nn.Linear`` by name: bool [K], True where any element was that large so far.
    """
    if not check_threshold("observe_outliers: threshold", threshold):
        raise ValueError("observe_outliers: threshold is 0, for which every element is an outlier; expected a positive number")
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        large = (inputs[0].detach().abs() >= threshold).reshape(-1, inputs[0].shape[-1]).any(0)
        found[name] = found[name] | large if name in found else large

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _numbers(columns: Tensor | Sequence[int], K: int) -> Tensor:
    what = "OutlierAwareLinear: outlier_columns"
    numbers = torch.as_tensor(columns) if len(columns) else torch.zeros(0, dtype=torch.int64)
    if numbers.dtype == torch.bool:
        if numbers.shape != (K,):
            raise ValueError(f"{what} is bool {list(numbers.shape)}, expected [{K}], the layer's in_features")
        return numbers.nonzero().view(-1)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.ndim != 1:
        raise TypeError(f"{what} is {numbers.dtype} {list(numbers.shape)}, expected bool [{K}] or integers [C]")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < K:
        raise ValueError(f"{what} holds {int(numbers.min())} to {int(numbers.max())}, expected 0 to {K - 1}")
    if len(numbers.unique()) != len(numbers):
        raise ValueError(f"{what} names a column twice, expected each once")
    return numbers.long()
