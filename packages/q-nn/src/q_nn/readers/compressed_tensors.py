"""The layouts of compressed-tensors (vLLM's llm-compressor) for integer weights.

Of each layer [N, K], "pack-quantized" holds ``weight_packed`` int32 [N, ceil(K / 8)], codes of 4 bits along K, lowest bits first;
``weight_shape`` int64 [2]; ``weight_scale`` [N, groups]; and with zero points ``weight_zero_point`` int32 [ceil(N / 8), groups], packed
along N. "int-quantized" and "naive-quantized" hold ``weight`` int8 [N, K], ``weight_scale`` [N, groups], or one of the whole, and
``weight_zero_point`` int8 alike. Codes and zero points are signed; packed ones have 8 added.

What a scheme says of activations is how a program computes, and not read here: a layer takes them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from q_core.formats.weight_format import WEIGHT_DTYPES
from q_nn.patterns import check_patterns
from q_nn.readers.checks import Parts, Settings, refuse
from q_nn.readers.grouped_weight import GroupedWeight, unpack_words

_PACKED = "pack-quantized"
_PLAIN = ("int-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some layers are quantized.

    Attributes:
        targets: names of layers, regular expressions after "re:", or "Linear" for all.
        packed: in words of several codes, or in one int8 each.
        strategy: what shares a scale.
        group_size: columns a scale in groups.
        symmetric: whether there are no zero points.
        ordered: whether ``weight_g_idx`` may be there, the group of each column.
    """

    targets: tuple[str, ...]
    packed: bool
    strategy: Literal["tensor", "channel", "group"]
    group_size: int | None
    symmetric: bool
    ordered: bool

    @classmethod
    def from_dict(cls, where: str, config: object, format: str) -> Scheme:
        scheme = Settings(where, config)
        targets = scheme.take("targets")
        if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
            refuse(f"{where}: targets", f"is {targets!r}", "names of layers")
        for target in targets:
            if target.startswith("re:"):
                check_patterns(f"{where}: targets", (target.removeprefix("re:"),))
        packed = (scheme.choice("format", (_PACKED, *_PLAIN, None)) or format) == _PACKED
        weights = Settings(f"{where}: weights", scheme.take("weights"))
        scheme.ignore("input_activations", "output_activations")
        scheme.done()

        weights.choice("num_bits", (4,) if packed else (8,))
        weights.choice("type", ("int",))
        weights.choice("dynamic", (False,), False)
        symmetric = weights.flag("symmetric", True)
        group_size = weights.size("group_size")
        strategy = weights.choice("strategy", ("tensor", "channel", "group"), "group" if group_size else "channel")
        if (strategy == "group") != (group_size is not None):
            refuse(
                f"{where}: weights", f"has the strategy {strategy!r} and the group_size {group_size}", "both of groups or neither"
            )
        actorder = weights.choice("actorder", ("weight", "static", "group", "dynamic", True, False, None))
        weights.absent("block_structure")
        weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
        weights.done()
        return cls(tuple(targets), packed, strategy, group_size, symmetric, actorder in ("group", "dynamic", True))

    def means(self, module: str) -> bool:
        """Whether a target names the layer, or its end, or matches its name."""
        return any(
            re.match(target.removeprefix("re:"), module) is not None
            if target.startswith("re:")
            else target == module or module.endswith(f".{target}")
            for target in self.targets
        )


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """How a checkpoint's weights are quantized.

    Attributes:
        schemes: in the order of the settings. One that names a layer goes before one for all.
    """

    schemes: tuple[Scheme, ...]

    marker: ClassVar[str] = "weight_scale"
    parts: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight_packed",
        "weight_shape",
        "weight_scale",
        "weight_zero_point",
        "weight_g_idx",
    )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CompressedTensors:
        """Read a ``quantization_config``.

        Raises:
            ValueError, TypeError: a setting is unknown or not supported; the message names it.
        """
        settings = Settings("quantization_config", config)
        settings.choice("quant_method", ("compressed-tensors",))
        format = settings.choice("format", (_PACKED, *_PLAIN, "mixed-precision"))
        settings.choice("quantization_status", ("compressed", "frozen", None))
        groups = settings.take("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            refuse("quantization_config: config_groups", f"is {groups!r}", "schemes by name")
        settings.absent("kv_cache_scheme", "transform_config", "moe_sparsity_config")
        sparsity = Settings("quantization_config: sparsity_config", settings.take("sparsity_config") or {})
        if sparsity.content:
            sparsity.choice("format", ("dense",))
        settings.ignore("ignore", "global_compression_ratio", "version")
        settings.done()
        schemes = (Scheme.from_dict(f"quantization_config: {name}", scheme, format) for name, scheme in groups.items())
        return cls(tuple(schemes))

    def read(self, layer: Parts) -> GroupedWeight:
        """Read the weight of a layer.

        Raises:
            ValueError: a tensor is missing or contradicts the settings or another; the message names it.
        """
        named = [scheme for scheme in self.schemes if scheme.means(layer.module)]
        general = [scheme for scheme in self.schemes if "Linear" in scheme.targets]
        if not (named or general):
            refuse(layer.key("weight"), "is quantized", "a target in config_groups that means it")
        scheme = (named or general)[0]
        unwanted = ("weight",) if scheme.packed else ("weight_packed", "weight_shape")
        for name in (*unwanted, *(("weight_zero_point",) if scheme.symmetric else ())):
            if layer.has(name):
                refuse(layer.key(name), "is there", "no such tensor by the scheme in config_groups that means it")
        return _packed(layer, scheme) if scheme.packed else _plain(layer, scheme)


def _packed(layer: Parts, scheme: Scheme) -> GroupedWeight:
    shape = layer.take("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
    if min(shape) < 0 or max(shape) >= 2**31:
        refuse(layer.key("weight_shape"), f"says {shape}", "sizes [N, K]")
    N, K = shape
    words = layer.take("weight_packed", (torch.int32,), (N, -(-K // 8)))
    scale, groups = _scale(layer, scheme, N, K)
    zero = None
    if not scheme.symmetric:
        packed_zeros = layer.take("weight_zero_point", (torch.int32,), (-(-N // 8), groups))
        zero = unpack_words(packed_zeros.T, 4)[:, :N].T.contiguous()
    codes = unpack_words(words, 4)[:, :K]
    return GroupedWeight(layer.key("weight"), 4, codes, scale, zero, _group_of(layer, scheme, K))


def _plain(layer: Parts, scheme: Scheme) -> GroupedWeight:
    codes = layer.take("weight", (torch.int8,), (None, None))
    N, K = codes.shape
    scale, groups = _scale(layer, scheme, N, K)
    zero = None
    if not scheme.symmetric:
        zero = _unsigned(_by_rows(layer, "weight_zero_point", (torch.int8,), scheme, N, groups))
    return GroupedWeight(layer.key("weight"), 8, _unsigned(codes), scale, zero, _group_of(layer, scheme, K))


def _scale(layer: Parts, scheme: Scheme, N: int, K: int) -> tuple[Tensor, int]:
    _, groups = layer.groups(K, scheme.group_size)
    return _by_rows(layer, "weight_scale", WEIGHT_DTYPES, scheme, N, groups), groups


def _by_rows(layer: Parts, name: str, dtypes: tuple[torch.dtype, ...], scheme: Scheme, N: int, groups: int) -> Tensor:
    """A tensor that has a value a row and group; one of the whole weight is repeated."""
    if scheme.strategy == "tensor":
        return layer.take(name, dtypes, (1,)).expand(N).unsqueeze(1).contiguous()
    return layer.take(name, dtypes, (N, groups))


def _group_of(layer: Parts, scheme: Scheme, K: int) -> Tensor | None:
    if not layer.has("weight_g_idx"):
        return None
    if not scheme.ordered:
        refuse(layer.key("weight_g_idx"), "is there", "no such tensor, as actorder isn't 'group'")
    return layer.take("weight_g_idx", (torch.int32, torch.int64), (K,))


def _unsigned(codes: Tensor) -> Tensor:
    """Signed bytes as unsigned ones, 128 more."""
    return codes.view(torch.uint8) ^ 128
