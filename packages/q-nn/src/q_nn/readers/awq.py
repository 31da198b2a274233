"""AWQ's layout (arXiv 2306.00978), the one that AutoAWQ calls GEMM.

Of each layer [N, K], ``qweight`` int32 [K, N / 8] holds codes along N, ``qzeros`` int32 [groups, N / 8] zero points alike, ``scales``
[groups, N]. The codes of a word, lowest bits first, are those of the columns 0, 2, 4, 6, 1, 3, 5, 7 of eight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from q_core.formats.weight_format import WEIGHT_DTYPES
from q_nn.readers.checks import Parts, Settings
from q_nn.readers.grouped_weight import GroupedWeight, unpack_words

_ABOUT_MAKING = (
    "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "sym", "desc_act",
    "meta", "tokenizer", "dataset", "damp_percent", "true_sequential", "model_seqlen", "batch_size", "block_name_to_quantize",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "pad_token_id", "max_input_length",
    "cache_block_outputs", "act_group_aware", "checkpoint_format",
)  # fmt: skip
"""Settings that say how weights were made, or how a program computes with them, and those that transformers' class inherits of GPTQ's."""

_PLACE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the code of each of eight columns is."""


@dataclass(frozen=True, slots=True)
class AWQ:
    """How a checkpoint's weights are quantized.

    Attributes:
        group_size: columns a scale, ``None`` for whole rows.
    """

    group_size: int | None

    marker: ClassVar[str] = "qweight"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AWQ:
        """Read a ``quantization_config``.

        Raises:
            ValueError, TypeError: a setting is unknown or not supported; the message names it.
        """
        settings = Settings("quantization_config", config)
        settings.choice("quant_method", ("awq",))
        settings.choice("bits" if "w_bit" not in config else "w_bit", (4,), 4)
        group_size = settings.size("group_size" if "q_group_size" not in config else "q_group_size", 128)
        settings.choice("zero_point", (True,), True)
        for key in ("version", "format"):
            settings.choice(key, ("gemm", "GEMM"), "gemm")
        settings.absent("dynamic")
        settings.ignore(*_ABOUT_MAKING)
        settings.done()
        return cls(group_size)

    def read(self, layer: Parts) -> GroupedWeight:
        """Read the weight of a layer.

        Raises:
            ValueError: a tensor is missing or contradicts the settings or another; the message names it.
        """
        qweight = layer.take("qweight", (torch.int32,), (None, None))
        K, N = qweight.shape[0], qweight.shape[1] * 8
        _, groups = layer.groups(K, self.group_size)
        scales = layer.take("scales", WEIGHT_DTYPES, (groups, N))
        qzeros = layer.take("qzeros", (torch.int32,), (groups, N // 8))
        codes, zeros = (_columns(words).T.contiguous() for words in (qweight, qzeros))
        return GroupedWeight(layer.key("weight"), 4, codes, scales.T.contiguous(), zeros)


def _columns(words: Tensor) -> Tensor:
    eights: Tensor = unpack_words(words, 4).unflatten(1, (-1, 8))
    return eights[:, :, _PLACE_OF_COLUMN].flatten(1)
