"""A model's config.json, read strictly: a key that changes the maths is honoured or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q_serve.errors import ModelError
from q_serve.json_file import read_json
from q_serve.models.rope import RopeConfig

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attn_logit_softcapping": (None,),
    "auto_map": (None, {}),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
}
"""Keys that change what some model computes, and the values at which they don't. At any other value a model is refused."""

_MAX_SIZE = 1 << 24
"""No dimension of a model is near this; a larger one is a broken file."""


_MAX_LAYERS = 4096
"""Each layer is a few objects even before it has weights."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder of the Llama family is made of.

    Attributes:
        architecture: name of the model's class, from ``architectures``.
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: sizes.
        max_position_embeddings: longest sequence the model was made for.
        rms_norm_eps: added to the mean of squares in norms.
        rope: rotary embedding.
        qkv_bias, output_bias, mlp_bias: which linears have a bias.
        tie_word_embeddings: whether the output layer's weight is the embedding's.
        sliding_window: attention's reach in tokens; ``None`` if it reaches all.
        dtype: the checkpoint's dtype by torch's name ("bfloat16"), if it says.
        quantization: the ``quantization_config``, if there is one.
        raw: all of config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    sliding_window: int | None
    dtype: str | None
    quantization: Mapping[str, Any] | None
    raw: Mapping[str, Any]


class ConfigReader:
    """Takes typed values out of a config.json; every error names the file, the key and what was expected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path)

    def error(self, message: str) -> ModelError:
        """An error about this file."""
        return ModelError(f"{self.path}: {message}")

    def size(self, key: str, default: int | None = None, *, most: int = _MAX_SIZE) -> int:
        """A positive integer."""
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise self.error(f"{key} is missing")
            return default
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(f"{key} is {value!r}, expected an integer in 1…{most}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.error(f"{key} is {value!r}, expected true or false")
        return value

    def text(self, key: str) -> str | None:
        """Text, or nothing."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} is {value!r}, expected text")
        return value

    def architecture(self) -> str:
        """The one class that the model is of."""
        value = self.raw.get("architectures")
        if not (isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)):
            raise self.error(f"architectures is {value!r}, expected a list with the name of one class")
        return value[0]


def read_llama_config(
    reader: ConfigReader, *, qkv_bias: bool, output_bias: bool, mlp_bias: bool, sliding_window: int | None
) -> ModelConfig:
    """Read what Llama, Mistral and Qwen2 have in common; the rest is the family's to say.

    Raises:
        ModelError: a value is missing, of the wrong kind, or asks for what this engine doesn't do.
    """
    raw = reader.raw
    for key, neutral in _NEUTRAL.items():
        if key in raw and raw[key] not in neutral:
            raise reader.error(f"{key} is {raw[key]!r}, which q-serve does not support (only {neutral[-1]!r})")
    if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise reader.error(f"hidden_act is {activation!r}, which q-serve does not support (only 'silu')")
    reaches = {"full_attention"} if sliding_window is None else {"full_attention", "sliding_attention"}
    layer_types = raw.get("layer_types") or []
    if not (isinstance(layer_types, list) and reaches.issuperset(map(str, layer_types))):
        raise reader.error(f"layer_types is {layer_types!r}, expected a list of {' or '.join(sorted(reaches))}")
    quantization = raw.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise reader.error(f"quantization_config is {quantization!r}, expected an object")

    hidden_size, num_heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    num_kv_heads = reader.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise reader.error(f"num_attention_heads is {num_heads}, expected a multiple of num_key_value_heads, {num_kv_heads}")
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise reader.error(
            f"hidden_size is {hidden_size}, expected a multiple of num_attention_heads, {num_heads}, without head_dim"
        )
    head_dim = reader.size("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise reader.error(f"head_dim is {head_dim}, expected an even number, since components rotate in pairs")
    eps = raw.get("rms_norm_eps", 1e-6)
    if type(eps) is not float or not (math.isfinite(eps) and eps > 0):
        raise reader.error(f"rms_norm_eps is {eps!r}, expected a positive number")

    return ModelConfig(
        architecture=reader.architecture(),
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers", most=_MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reader.size("max_position_embeddings"),
        rms_norm_eps=eps,
        rope=RopeConfig.from_config(reader.path, raw),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        sliding_window=sliding_window,
        dtype=reader.text("dtype") or reader.text("torch_dtype"),
        quantization=quantization,
        raw=raw,
    )
