"""The weights of a GGUF file: its types of tensors, and its names as transformers has them.

============  ===================================================================  =========================================
type          is held as                                                           and decodes to
============  ===================================================================  =========================================
Q4_0          ``FourBit("int4", 32)``, 5 bits a weight                             within 2^-22 of each value
Q8_0          ``AffineGroups(8, 32)``, 8.5 bits as in the file                     the exact value in float32
Q4_K          ``SuperGroups(group_size=32, per_block=8)``, 4.625 bits              the same float32 as ggml's
F32 F16 BF16  a plain tensor                                                       itself
============  ===================================================================  =========================================

Of the architectures "llama", "qwen2" and "qwen3" tensors go by transformers' names. llama.cpp stores the rows of llama's query and key
projections in another order, for a rotary embedding of neighbours and not of halves; they are put back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q_core.formats.grouped_int import SuperGroups, pack_codes
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.weight_format import WeightFormat
from q_nn.readers.checks import refuse
from q_nn.readers.gguf_file import Entry, GGUFFile
from q_nn.readers.grouped_weight import GroupedWeight, with_dtype

_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SETTINGS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""What metadata and a config both say."""

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>[a-z_]+)\.(?P<own>weight|bias)")
_COMPUTED = "rope_freqs.weight"
"""What transformers computes from its config."""


def read_gguf(path: Path, dtype: torch.dtype | None, requantize: WeightFormat | None) -> dict[str, Tensor]:
    """All tensors of a file, by transformers' names where they are known; see :func:`q_nn.read_weights`."""
    file = GGUFFile(path)
    architecture = file.metadata.get("general.architecture")
    known = architecture in _ARCHITECTURES
    result: dict[str, Tensor] = {}
    for name, entry in file.entries.items():
        if known and name == _COMPUTED:
            continue
        rows = file.read(name)
        if architecture == "llama" and (heads := _heads(file.metadata, name)):
            rows, entry = _halves_together(name, rows, entry, heads)
        result[_renamed(name, path) if known else name] = _tensor(f"{path.name}: {name}", rows, entry, dtype, requantize)
    return result


def check_config(path: Path, config: Any) -> None:
    """Refuse a file whose metadata contradicts the config of a model that it is loaded into.

    Args:
        path: of the file.
        config: a transformers config, or anything with some of its attributes.

    Raises:
        ValueError: they differ; the message names what.
    """
    metadata = GGUFFile(path).metadata
    architecture = metadata.get("general.architecture")
    rope = getattr(config, "rope_parameters", None)
    for key, name in _SETTINGS.items():
        said = metadata.get(f"{architecture}.{key}")
        expected = rope.get(name) if isinstance(rope, Mapping) and key.startswith("rope.") else getattr(config, name, None)
        if said is None or expected is None:
            continue
        # A file has float32 and a config float64.
        if not isinstance(said, int | float) or not math.isclose(said, expected, rel_tol=1e-6):
            refuse(f"{path.name}: {architecture}.{key}", f"is {said!r}", f"the config's {name}, {expected!r}")


def _renamed(name: str, path: Path) -> str:
    match = _NAME.fullmatch(name)
    if match is None or match["part"] not in _NAMES:
        refuse(f"{path.name}: {name}", "isn't a tensor of a dense decoder of the llama family", "one")
    layer = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{layer}{_NAMES[match['part']]}.{match['own']}"


def _heads(metadata: Mapping[str, Any], name: str) -> int:
    """How many heads the rows of a tensor belong to that llama.cpp reorders; 0 for any other."""
    match = _NAME.fullmatch(name)
    if match is None or match["part"] not in ("attn_q", "attn_k"):
        return 0
    heads = metadata.get("llama.attention.head_count")
    if match["part"] == "attn_k":
        heads = metadata.get("llama.attention.head_count_kv", heads)
    if type(heads) is not int or heads <= 0:
        refuse(
            "GGUF metadata: llama.attention.head_count and head_count_kv",
            f"say {heads!r}",
            "numbers of heads, by which rows are ordered",
        )
    return heads


def _halves_together(name: str, rows: Tensor, entry: Entry, heads: int) -> tuple[Tensor, Entry]:
    """The rows of each head as transformers has them: all the first ones of neighbouring pairs, then all the second ones."""
    if len(entry.shape) == 1:  # a bias, whose elements are rows
        rows = rows.view(-1, entry.kind.bytes)
    if len(rows) % (2 * heads):
        refuse(name, f"has {len(rows)} rows", f"an even number for each of {heads} heads")
    order = torch.arange(len(rows)).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    return rows[order].view(-1, entry.row_bytes), entry


def _tensor(what: str, rows: Tensor, entry: Entry, dtype: torch.dtype | None, requantize: WeightFormat | None) -> Tensor:
    kind = entry.kind.name
    if kind in _DENSE:
        return rows.flatten().view(_DENSE[kind]).view(entry.shape)
    if len(entry.shape) != 2:
        refuse(what, f"is {kind} {list(entry.shape)}", "two axes [N, K], as stacked experts and vectors aren't read in this type")
    blocks = rows.view(len(rows), entry.shape[-1] // entry.kind.elements, entry.kind.bytes)
    quantized = _READERS[kind](what, blocks, dtype, requantize)
    return quantized


def _q4_0(what: str, blocks: Tensor, dtype: torch.dtype | None, requantize: WeightFormat | None) -> QuantizedTensor:
    """A float16 scale and 16 bytes: elements 0 to 15 in their low halves, 16 to 31 in the high ones; each less 8."""
    halves = blocks[:, :, 2:]
    codes = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1)
    return GroupedWeight(what, 4, codes, _half(blocks, 0)).quantized(dtype, requantize)


def _q8_0(what: str, blocks: Tensor, dtype: torch.dtype | None, requantize: WeightFormat | None) -> QuantizedTensor:
    """A float16 scale and 32 signed bytes."""
    return GroupedWeight(what, 8, (blocks[:, :, 2:] ^ 128).flatten(1), _half(blocks, 0)).quantized(dtype, requantize)


def _q4_k(what: str, blocks: Tensor, dtype: torch.dtype | None, requantize: WeightFormat | None) -> QuantizedTensor:
    """Float16 scales of scales and of minima, 8 of each in 6 bits in 12 bytes, and 128 bytes: of each 32, first the low halves."""
    N, K = len(blocks), blocks.shape[1] * 256
    super_scale, super_min = _half(blocks, 0), _half(blocks, 2)
    if not bool(torch.isfinite(super_scale).all() and torch.isfinite(super_min).all()):
        refuse(what, "has scales that are NaN or infinite", "finite ones")
    low, mins, high = blocks[:, :, 4:8], blocks[:, :, 8:12], blocks[:, :, 12:16]
    scale = torch.cat((low & 63, (high & 15) | (low >> 2 & 48)), dim=-1).flatten(1)
    min = torch.cat((mins & 63, (high >> 4) | (mins >> 2 & 48)), dim=-1).flatten(1)
    halves = blocks[:, :, 16:].unflatten(-1, (4, 32))
    codes = torch.stack((halves & 15, halves >> 4), dim=-2).view(N, K)
    components = {**pack_codes(codes, 4), "scale": scale, "min": min, "super_scale": super_scale, "super_min": super_min}
    weight = QuantizedTensor.from_components(components, SuperGroups(), shape=(N, K), dtype=torch.float32)
    if requantize is not None:
        weight = QuantizedTensor.quantize(weight.dequantize(), requantize)
    return with_dtype(weight, dtype or torch.float16)


_READERS: dict[str, Callable[[str, Tensor, torch.dtype | None, WeightFormat | None], QuantizedTensor]] = {
    "Q4_0": _q4_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
}


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 of each block at a byte."""
    return blocks[:, :, start : start + 2].contiguous().view(torch.float16).squeeze(-1)
