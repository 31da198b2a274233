"""How much memory a model's weights take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.sharding import is_dtensor


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model, each counted once; of quantized ones what they store.

    Of parameters that are sharded it counts this process's part.
    """
    return sum(tensor_bytes(tensor) for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def tensor_bytes(tensor: Tensor) -> int:
    if is_dtensor(tensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.stored_bytes if isinstance(tensor, QuantizedTensor) else tensor.nbytes
