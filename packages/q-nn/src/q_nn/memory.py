"""How much memory a model's weights take."""

from __future__ import annotations

from torch import Tensor, nn

from q_core.formats.quantized_tensor import QuantizedTensor


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, each counted once; of quantized ones what they store."""
    return sum(tensor_bytes(tensor) for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.stored_bytes if isinstance(tensor, QuantizedTensor) else tensor.nbytes
