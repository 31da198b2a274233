"""Which class holds which format, and how one takes a dense layer's place."""

from __future__ import annotations

from torch import nn

from q_core.formats.four_bit import FourBit
from q_core.formats.grouped_int import GroupedInt
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_nn.embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, QuantizedEmbedding
from q_nn.linear import QuantizedLinear
from q_nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from q_nn.linear8bit import Linear8bitLt
from q_nn.linear_grouped import LinearGroupedInt

_FOUR_BIT_LAYERS: dict[str, type[QuantizedLinear]] = {"nf4": LinearNF4, "fp4": LinearFP4}
_FOUR_BIT_EMBEDDINGS: dict[str, type[QuantizedEmbedding]] = {"nf4": EmbeddingNF4, "fp4": EmbeddingFP4}


def layer_for(format: WeightFormat) -> type[QuantizedLinear]:
    """The class of layers whose weight is held in that format."""
    if isinstance(format, FourBit):
        return _FOUR_BIT_LAYERS.get(format.quant_type, Linear4bit)
    if isinstance(format, Int8Rows):
        return Linear8bitLt
    if isinstance(format, GroupedInt):
        return LinearGroupedInt
    raise TypeError(f"q_nn has no linear layer for {format}")


def around(linear: nn.Linear, weight: QuantizedTensor) -> QuantizedLinear:
    """A layer for the weight's format with the rest of ``linear``."""
    return layer_for(weight.format)._around(linear, weight)


def embedding_around(embedding: nn.Embedding, weight: QuantizedTensor) -> QuantizedEmbedding:
    """An embedding for the table's format with the rest of ``embedding``, which passed :func:`q_nn.embedding.check_embedding`."""
    if isinstance(weight.format, FourBit):
        return _FOUR_BIT_EMBEDDINGS.get(weight.format.quant_type, Embedding4bit)._around(embedding, weight)
    if isinstance(weight.format, Int8Rows):
        return Embedding8bit._around(embedding, weight)
    raise TypeError(f"q_nn has no embedding for {weight.format}")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a child, under all its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
