"""How much memory the keys and values of a model's past tokens take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

KVDtype = Literal["float32", "bfloat16", "float16", "int8", "fp8"]
KV_DTYPES: tuple[KVDtype, ...] = get_args(KVDtype)

_ELEMENT_BYTES: Mapping[KVDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
_SCALE_BYTES: Mapping[KVDtype, int] = {"int8": 4, "fp8": 4}
"""Of a token and head, keys and values each: a float32, see :func:`q_core.ops.write_kv`."""

_UNUSUAL = ("kv_lora_rank", "ssm_state_size", "state_size", "mamba_d_state", "linear_num_key_heads", "conv_L_cache")
"""Fields of configs of models that keep something else than each token's keys and values."""


@dataclass(frozen=True, slots=True)
class KVCache:
    """The shape of a model's cache: per layer of attention how many tokens back it looks, ``None`` for all of them."""

    windows: tuple[int | None, ...]
    kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: KVDtype) -> int:
        """Of one token in all layers."""
        return len(self.windows) * self._layer_bytes(dtype)

    def sequence_bytes(self, length: int, dtype: KVDtype) -> int:
        """Of a sequence of so many tokens. A layer with a window keeps no more than that."""
        tokens = sum(length if window is None else min(length, window) for window in self.windows)
        return tokens * self._layer_bytes(dtype)

    def _layer_bytes(self, dtype: KVDtype) -> int:
        return 2 * self.kv_heads * (self.head_dim * _ELEMENT_BYTES[dtype] + _SCALE_BYTES.get(dtype, 0))


def kv_cache_of(config: Any) -> KVCache | str:
    """The cache that a transformers config asks for, or in words why that can't be said."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return "the model has an encoder and a decoder, whose caches are of two kinds"
    if field := next((field for field in _UNUSUAL if getattr(text, field, None)), None):
        return f"the model keeps something else than keys and values of all heads ({field} is {getattr(text, field)})"
    heads = getattr(text, "num_attention_heads", None)
    said = (
        getattr(text, "num_hidden_layers", None),
        getattr(text, "num_key_value_heads", None) or heads,
        getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None),
    )
    sizes = [size for size in said if isinstance(size, int) and size > 0]
    if len(sizes) < len(said):
        return "its config doesn't say how many heads of which size are kept"
    layers, kv_heads, head_dim = sizes
    windows = _windows(text, layers)
    return windows if isinstance(windows, str) else KVCache(windows, kv_heads, head_dim)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _windows(config: Any, layers: int) -> tuple[int | None, ...] | str:
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return (window,) * layers
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        return f"the model has layers of {', '.join(unknown)}"
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
