"""Embeddings whose table is quantized."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from q_core.formats.codebooks import FourBitType
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_nn.quantized_module import FourBitModule, QuantizedModule


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """``nn.Embedding`` with a :class:`QuantizedTensor` as its weight; see the subclasses.

    Of the table only the blocks that the tokens' rows touch are decoded, whatever its shape. It is frozen. So what shapes its gradient or
    changes it in a forward isn't there: ``max_norm``, ``sparse``, ``scale_grad_by_freq``. ``padding_idx`` says which row starts as zero.

    A linear layer that takes the format may share the table: ``head.weight = embedding.weight``. Copies, pickles and moves keep the two
    one, and so does loading in the same format; ``load_state_dict(assign=True)`` and a checkpoint in another format give each its own, as
    torch does.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: WeightFormat,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._hold(QuantizedTensor.quantize(self.weight.detach(), format))

    @classmethod
    def _around(cls, embedding: nn.Embedding, weight: QuantizedTensor) -> Self:
        """An embedding with this weight and the rest of ``embedding``, which passed :func:`check_embedding`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.num_embeddings, layer.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        layer.padding_idx, layer.norm_type = embedding.padding_idx, embedding.norm_type
        layer.max_norm, layer.scale_grad_by_freq, layer.sparse = None, False, False
        layer._hold(weight)
        layer.train(embedding.training)
        return layer

    @classmethod
    def _quantized(cls, embedding: nn.Embedding, format: WeightFormat) -> Self:
        check_embedding(f"{cls.__name__}.from_embedding", embedding)
        return cls._around(embedding, QuantizedTensor.quantize(embedding.weight, format))

    def reset_parameters(self) -> None:
        """Draw a new random table, as ``nn.Embedding`` does, and quantize it."""
        weight = getattr(self, "weight", None)
        if not isinstance(weight, QuantizedTensor):
            super().reset_parameters()
            return
        sizes = self.num_embeddings, self.embedding_dim
        dense = nn.Embedding(*sizes, self.padding_idx, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            weight.copy_(dense.weight)


class Embedding4bit(FourBitModule, QuantizedEmbedding):
    """An embedding with a 4-bit table.

    State dicts go both ways as those of :class:`q_nn.Linear4bit`.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of a vector, any.
        padding_idx: the row that starts as zero.
        device, dtype: of the table before it is quantized; the dtype is that of the output too. With device "meta" nothing is allocated.
        quant_type: "nf4" (the default), "fp4", "int4", "mxfp4" or "nvfp4".
        blocksize, double_quant: as in :class:`q_nn.Linear4bit`.

    Raises:
        ValueError: the type is unknown, or doesn't have that blocksize or double quantization.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: FourBitType | None = None,
        blocksize: int | None = None,
        double_quant: bool | None = None,
    ) -> None:
        format = self._format(quant_type, blocksize, double_quant)
        super().__init__(num_embeddings, embedding_dim, padding_idx, device, dtype, format=format)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        quant_type: FourBitType | None = None,
        blocksize: int | None = None,
        double_quant: bool | None = None,
    ) -> Self:
        """Quantize the table of an embedding.

        Raises:
            TypeError: the embedding computes something else than ``nn.Embedding`` does.
            ValueError: the table has an element that is not finite, the embedding has a setting that a frozen table can't have, or the
                settings here are wrong.
        """
        return cls._quantized(embedding, cls._format(quant_type, blocksize, double_quant))


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` in 4-bit NormalFloat."""

    fixed_type = "nf4"


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` in bitsandbytes' FP4."""

    fixed_type = "fp4"


class Embedding8bit(QuantizedEmbedding):
    """An embedding with an int8 table, one scale a row.

    State dicts go both ways as those of :class:`q_nn.Linear8bitLt`.

    Args:
        num_embeddings: size of the vocabulary.
        embedding_dim: size of a vector.
        padding_idx: the row that starts as zero.
        device, dtype: of the table before it is quantized; the dtype is that of the output too. With device "meta" nothing is allocated.
    """

    holds = Int8Rows

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device, dtype, format=Int8Rows())

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> Self:
        """Quantize the table of an embedding.

        Raises:
            TypeError: the embedding computes something else than ``nn.Embedding`` does.
            ValueError: the table has an element that is not finite, or the embedding has a setting that a frozen table can't have.
        """
        return cls._quantized(embedding, Int8Rows())


def check_embedding(operation: str, embedding: nn.Embedding) -> None:
    """Refuse an embedding that a quantized one can't take the place of.

    Raises:
        TypeError: it computes something else than ``nn.Embedding`` does.
        ValueError: it renormalizes its rows (``max_norm``), or wants another gradient for its table, which gets none.
    """
    if type(embedding).forward is not nn.Embedding.forward:
        raise TypeError(
            f"{operation}: embedding is a {type(embedding).__name__} with a forward of its own, expected nn.Embedding; "
            "quantize its weight alone: QuantizedTensor.quantize"
        )
    if (reason := embedding_refusal(embedding)) is not None:
        raise ValueError(f"{operation}: embedding can't be quantized: {reason}")


def embedding_refusal(embedding: nn.Embedding) -> str | None:
    """Which setting a quantized embedding can't have, and what to do; ``None`` if there is none."""
    if embedding.max_norm is not None:
        return (
            f"its max_norm is {embedding.max_norm}, expected None, as it rewrites rows of the table in each forward; "
            "renormalize the table once, and set max_norm to None"
        )
    for setting in ("sparse", "scale_grad_by_freq"):
        if getattr(embedding, setting):
            return f"its {setting} is True, expected False, as it shapes a gradient that the table doesn't get; set it to False"
    return None
