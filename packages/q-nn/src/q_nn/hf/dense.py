"""Quantized modules turned back into the dense ones that they stand for."""

from __future__ import annotations

import torch
from torch import nn

from q_core.formats.quantized_tensor import QuantizedTensor


def dense_module(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A plain layer with what a quantized one decodes to.

    Args:
        module: a quantized linear layer or embedding.
        dtype: of the result's parameters; the quantized weight's own if not given.

    Raises:
        ValueError: there is no plain layer for it.
    """
    dense: nn.Module
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, nn.Embedding):
            dense = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        else:
            raise ValueError(f"dequantize: {type(module).__name__} has no plain module to take its place, expected a linear layer")
    for name, parameter in module._parameters.items():
        if isinstance(parameter, QuantizedTensor):
            decoded = parameter.dequantize()
            dense._parameters[name] = nn.Parameter(decoded if dtype is None else decoded.to(dtype))
        elif parameter is not None:
            dense._parameters[name] = parameter
    return dense.train(module.training)
