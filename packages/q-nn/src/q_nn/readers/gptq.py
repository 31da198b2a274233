"""GPTQ's layout (arXiv 2210.17323), as AutoGPTQ and GPTQModel write it.

Of each layer [N, K], ``qweight`` int32 [K * bits / 32, N] holds codes along K, lowest bits first; ``scales`` [groups, N]; ``qzeros`` int32
[groups, N * bits / 32] zero points along N; ``g_idx`` int32 [K] the group of each column. In the format "gptq" (v1) zero points are stored
less one, subtracted from whole words, so that a borrow goes on to the next code; in "gptq_v2" as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from q_core.formats.weight_format import WEIGHT_DTYPES
from q_nn.readers.checks import Parts, Settings, refuse
from q_nn.readers.grouped_weight import GroupedWeight, unpack_words

_ABOUT_MAKING = (
    "meta", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "act_group_aware", "lm_head",
    "model_name_or_path", "model_file_base_name", "quant_device", "parallel_packing", "device", "tokenizer", "dataset",
    "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "batch_size",
    "pad_token_id", "max_input_length", "cache_block_outputs", "backend", "offload_to_disk", "offload_to_disk_path",
    "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "cache_examples_on_gpu",
)  # fmt: skip
"""Settings that say how weights were made, or how a program computes with them."""

_ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, slots=True)
class GPTQ:
    """How a checkpoint's weights are quantized.

    Attributes:
        bits: of a code.
        group_size: columns a scale, ``None`` for whole rows.
        ordered: whether columns were ordered by their activations ("desc_act"), so that groups aren't columns side by side; ``None`` if
            the settings don't say.
        symmetric: whether all zero points are in the middle; ``None`` likewise.
        version: 1 or 2 of the format.
    """

    bits: Literal[4, 8]
    group_size: int | None
    ordered: bool | None
    symmetric: bool | None
    version: Literal[1, 2]

    marker: ClassVar[str] = "qweight"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GPTQ:
        """Read a ``quantization_config``.

        Raises:
            ValueError, TypeError: a setting is unknown or not supported; the message names it.
        """
        settings = Settings("quantization_config", config)
        settings.choice("quant_method", ("gptq",))
        bits = settings.choice("bits", (4, 8))
        group_size = settings.size("group_size", 128)
        ordered, symmetric = (settings.choice(key, (True, False, None)) for key in ("desc_act", "sym"))
        formats = {settings.choice(key, ("gptq", "gptq_v2"), None) for key in ("checkpoint_format", "format") if key in config}
        if len(formats) > 1:
            refuse("quantization_config", f"says the formats {sorted(formats)}", "one of them")
        settings.choice("pack_dtype", ("int32",), "int32")
        settings.absent("dynamic", "is_marlin_format", "adapter", "rotation")
        settings.ignore(*_ABOUT_MAKING)
        settings.done()
        return cls(bits, group_size, ordered, symmetric, 2 if formats == {"gptq_v2"} else 1)

    def read(self, layer: Parts) -> GroupedWeight:
        """Read the weight of a layer.

        Raises:
            ValueError: a tensor is missing or contradicts the settings or another; the message names it.
        """
        a_word = 32 // self.bits
        qweight = layer.take("qweight", (torch.int32,), (None, None))
        K, N = qweight.shape[0] * a_word, qweight.shape[1]
        if N % a_word:
            refuse(layer.key("qweight"), f"has {N} columns", f"a multiple of {a_word}, as the zero points are packed along them")
        _, groups = layer.groups(K, self.group_size)
        scales = layer.take("scales", WEIGHT_DTYPES, (groups, N))
        qzeros = layer.take("qzeros", (torch.int32,), (groups, N // a_word))
        return GroupedWeight(
            layer.key("weight"),
            self.bits,
            unpack_words(qweight.T, self.bits),
            scales.T.contiguous(),
            self._zeros(layer, qzeros),
            self._group_of(layer, K, groups),
        )

    def _zeros(self, layer: Parts, qzeros: Tensor) -> Tensor:
        if self.version == 1:
            qzeros = (qzeros.long() + _ONES[self.bits]).to(torch.int32)
        zeros = unpack_words(qzeros, self.bits)
        middle = 2 ** (self.bits - 1)
        if self.symmetric and bool((zeros != middle).any()):
            refuse(
                layer.key("qzeros"), f"has zero points from {int(zeros.min())} to {int(zeros.max())}", f"{middle}, as sym is true"
            )
        return zeros.T.contiguous()

    def _group_of(self, layer: Parts, K: int, groups: int) -> Tensor | None:
        if not layer.has("g_idx"):
            if self.ordered and groups > 1:
                layer.take("g_idx", (torch.int32,), (K,))
            return None
        group_of = layer.take("g_idx", (torch.int32,), (K,))
        if self.ordered is False and not torch.equal(group_of, torch.arange(K, dtype=torch.int32) // (K // groups)):
            refuse(layer.key("g_idx"), "divides the columns otherwise", f"{K // groups} side by side, as desc_act is false")
        return group_of
