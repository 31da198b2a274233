"""GPTQ, AWQ and compressed-tensors: files as their formats define them, packed here code by code, against float64.

Long, because every format has a packer of its own here, which shares nothing with the readers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AwqConfig, GPTQConfig, LlamaForCausalLM

from q_nn import (
    FourBit,
    Linear4bit,
    LinearGroupedInt,
    LinearInt8,
    QuantizedTensor,
    load_foreign,
    load_into,
    read_weights,
    save_pretrained,
)
from q_nn.readers import gptq as gptq_reader
from q_nn.readers.checks import Parts
from q_nn.readers.directory import reader_for
from q_nn.readers.grouped_weight import GroupedWeight

MakeLlama = Callable[..., LlamaForCausalLM]
Codes = NDArray[np.int64]
EXACT = 0.0
NEAR = 2.0**-22


@dataclass
class Affine:
    """A weight rounded to the nearest of ``scale * (code - zero)``; groups are columns side by side of the permuted weight."""

    bits: int
    codes: Codes  # [N, K], in the order of the columns of the weight
    scale: Tensor  # [N, G]
    zero: Codes  # [N, G]
    group_of: Codes  # [K]

    @property
    def dense(self) -> Tensor:
        scale = self.scale.double().numpy()[:, self.group_of]
        return torch.from_numpy(scale * (self.codes - self.zero[:, self.group_of]))


def affine(
    weight: Tensor,
    group: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    shuffled: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Affine:
    dense = weight.detach().double().numpy()
    K = dense.shape[1]
    random = np.random.default_rng(K)
    group_of = np.arange(K) // group
    if shuffled:
        random.shuffle(group_of)
    top, groups = 2**bits - 1, K // group
    low, high = (np.stack([op(dense[:, group_of == g], axis=1) for g in range(groups)], axis=1) for op in (np.min, np.max))
    spread = 2 * np.maximum(-low, high) if symmetric else high - low
    scale = torch.from_numpy(spread / top).to(dtype)
    held = scale.double().numpy()
    zero = np.full(low.shape, (top + 1) // 2) if symmetric else np.clip(np.round(-low / held), 1, top).astype(np.int64)
    codes = np.clip(np.round(dense / held[:, group_of]) + zero[:, group_of], 0, top).astype(np.int64)
    if symmetric:
        assert codes.min() == 0  # -8 is there
    return Affine(bits, codes, scale, zero, group_of)


def words(codes: Codes, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [R, C] along C in words, lowest bits first: code ``order[i]`` of each word's is its i-th."""
    per = 32 // bits
    order = order or tuple(range(per))
    R, C = codes.shape
    packed = np.zeros((R, -(-C // per)), dtype=np.uint64)
    for column in range(C):
        place = order.index(column % per)
        packed[:, column // per] |= codes[:, column].astype(np.uint64) << np.uint64(bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def gptq(weight: Affine, version: int, *, with_index: bool = True) -> dict[str, Tensor]:
    zeros = words(weight.zero.T, weight.bits).numpy().view(np.uint32)
    if version == 1:
        zeros = zeros - np.uint32(sum(1 << shift for shift in range(0, 32, weight.bits)))
    parts = {
        "qweight": words(weight.codes.T.T, weight.bits).T.contiguous(),
        "qzeros": torch.from_numpy(zeros.view(np.int32).copy()),
        "scales": weight.scale.T.contiguous(),
        "g_idx": torch.from_numpy(weight.group_of.astype(np.int32)),
    }
    if not with_index:
        del parts["g_idx"]
    return parts


def awq(weight: Affine) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(weight.codes.T, 4, order),
        "qzeros": words(weight.zero.T, 4, order),
        "scales": weight.scale.T.contiguous(),
    }


def packed(weight: Affine, *, zeros: bool, index: bool = False) -> dict[str, Tensor]:
    parts = {
        "weight_packed": words(weight.codes, 4),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if zeros:
        parts["weight_zero_point"] = words(weight.zero.T, 4).T.contiguous()
    if index:
        parts["weight_g_idx"] = torch.from_numpy(weight.group_of.astype(np.int32))
    return parts


def plain(weight: Affine, *, zeros: bool) -> dict[str, Tensor]:
    parts = {"weight": torch.from_numpy((weight.codes - 128).astype(np.int8)), "weight_scale": weight.scale}
    if zeros:
        parts["weight_zero_point"] = torch.from_numpy((weight.zero - 128).astype(np.int8))
    return parts


def ct(scheme: dict[str, Any], format: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "dynamic": False, **scheme}, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": "0.20.0",
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
GROUP = {"num_bits": 4, "strategy": "group", "group_size": 64}
INT_GROUP = {"type": "int", **GROUP}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

Pack = Callable[[Tensor], tuple[Affine, dict[str, Tensor]]]


def case(
    name: str, config: dict[str, Any], pack: Callable[[Affine], dict[str, Tensor]], layer: type, error: float, **settings: Any
) -> Any:
    def make(weight: Tensor) -> tuple[Affine, dict[str, Tensor]]:
        options = {"group": 64, **settings}
        made = affine(weight, options.pop("group") or weight.shape[1], **options)
        return made, pack(made)

    return pytest.param(config, make, layer, error, id=name)


CASES = [
    case("gptq", GPTQ, lambda w: gptq(w, 1), LinearGroupedInt, EXACT),
    case("gptq-v2", {**GPTQ, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, 2, with_index=False), LinearGroupedInt, EXACT),
    case("gptq-sym", {**GPTQ, "sym": True}, lambda w: gptq(w, 1), Linear4bit, NEAR, symmetric=True),
    case("gptq-desc-act", {**GPTQ, "desc_act": True}, lambda w: gptq(w, 1), LinearGroupedInt, EXACT, shuffled=True),
    case(
        "gptq-desc-act-sym",
        {**GPTQ, "desc_act": True, "sym": True, "format": "gptq_v2"},
        lambda w: gptq(w, 2),
        LinearGroupedInt,
        EXACT,
        shuffled=True,
        symmetric=True,
    ),
    case("gptq-rows", {**GPTQ, "group_size": -1}, lambda w: gptq(w, 1), LinearGroupedInt, EXACT, group=None),
    case("gptq-8-bit", {**GPTQ, "bits": 8}, lambda w: gptq(w, 1), LinearGroupedInt, EXACT, bits=8),
    case("gptq-bf16", GPTQ, lambda w: gptq(w, 1), LinearGroupedInt, EXACT, dtype=torch.bfloat16),
    case("awq", AWQ, awq, LinearGroupedInt, EXACT),
    case("awq-32", {**AWQ, "group_size": 32}, awq, LinearGroupedInt, EXACT, group=32),
    case("ct-int4", ct(GROUP), lambda w: packed(w, zeros=False), Linear4bit, NEAR, symmetric=True, dtype=torch.bfloat16),
    case("ct-int4-asym", ct({**GROUP, "symmetric": False}), lambda w: packed(w, zeros=True), LinearGroupedInt, EXACT),
    case(
        "ct-int4-order",
        ct({**GROUP, "actorder": "group"}),
        lambda w: packed(w, zeros=False, index=True),
        LinearGroupedInt,
        EXACT,
        symmetric=True,
        shuffled=True,
    ),
    case(
        "ct-int4-rows",
        ct({"num_bits": 4, "strategy": "channel"}),
        lambda w: packed(w, zeros=False),
        Linear4bit,
        NEAR,
        group=None,
        symmetric=True,
    ),
    case(
        "ct-int8",
        ct({"num_bits": 8, "strategy": "channel"}, "int-quantized", input_activations=DYNAMIC),
        lambda w: plain(w, zeros=False),
        LinearInt8,
        NEAR,
        group=None,
        bits=8,
        symmetric=True,
        dtype=torch.bfloat16,
    ),
    case(
        "ct-int8-asym",
        ct({"num_bits": 8, "strategy": "channel", "symmetric": False}, "naive-quantized"),
        lambda w: plain(w, zeros=True),
        LinearGroupedInt,
        EXACT,
        group=None,
        bits=8,
    ),
    case(
        "ct-int8-groups",
        ct({**GROUP, "num_bits": 8}, "naive-quantized"),
        lambda w: plain(w, zeros=False),
        LinearGroupedInt,
        EXACT,
        bits=8,
        symmetric=True,
        dtype=torch.float32,
    ),
]


def quantized(model: LlamaForCausalLM, pack: Pack) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's tensors with its layers' linears quantized, and what those decode to, which is put into the model."""
    tensors = dict(model.state_dict())
    decoded: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            made, parts = pack(module.weight)
            del tensors[f"{name}.weight"]
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            decoded[f"{name}.weight"] = made.dense
            module.weight = nn.Parameter(made.dense.to(module.weight.dtype))
    return tensors, decoded


def save(directory: Path, model: LlamaForCausalLM, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    description = {**json.loads(model.config.to_json_string()), "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(description))


def write(model: LlamaForCausalLM, directory: Path, config: dict[str, Any], pack: Pack) -> dict[str, Tensor]:
    tensors, decoded = quantized(model, pack)
    save(directory, model, tensors, config)
    return decoded


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


@pytest.mark.parametrize(("config", "pack", "layer", "error"), CASES)
def test_decodes_to_what_the_format_defines(
    make_llama: MakeLlama, ids: Tensor, tmp_path: Path, config: dict[str, Any], pack: Pack, layer: type, error: float
) -> None:
    model = make_llama()
    decoded = write(model, tmp_path, config, pack)
    weights = read_weights(tmp_path, dtype=torch.float32)
    assert set(weights) == set(model.state_dict())
    for key, expected in decoded.items():
        weight = weights[key]
        assert isinstance(weight, QuantizedTensor)
        got = weight.dequantize().double()
        assert ((got - expected.float().double()).abs() <= error * expected.abs()).all()

    other = make_llama(seed=1)
    load_into(other, tmp_path)
    assert {type(module) for name, module in other.model.layers.named_modules() if isinstance(module, nn.Linear)} == {layer}
    assert type(other.lm_head) is nn.Linear
    torch.testing.assert_close(logits(other, ids), logits(model, ids))


@pytest.mark.parametrize(("config", "pack", "layer", "error"), CASES[:4])
def test_requantized(make_llama: MakeLlama, tmp_path: Path, config: dict[str, Any], pack: Pack, layer: type, error: float) -> None:
    decoded = write(make_llama(), tmp_path, config, pack)
    other = make_llama(dtype=torch.bfloat16)
    format = FourBit("nf4", 64, 256)
    load_foreign(other, tmp_path, requantize=format)
    for key, expected in decoded.items():
        weight = other.get_parameter(key)
        assert isinstance(weight, QuantizedTensor) and weight.format == format and weight.dtype == torch.bfloat16
        assert torch.equal(weight.dequantize(), QuantizedTensor.quantize(expected.float(), format).dequantize().bfloat16())


def test_the_default_dtype_is_the_scales(make_llama: MakeLlama, tmp_path: Path) -> None:
    write(make_llama(), tmp_path, GPTQ, CASES[0].values[1])
    weights = read_weights(tmp_path)
    assert {w.dtype for w in weights.values() if isinstance(w, QuantizedTensor)} == {torch.float16}
    with pytest.raises(TypeError, match="read_weights: dtype is float64"):
        read_weights(tmp_path, dtype=torch.float64)


# --- what is refused ------------------------------------------------------------------------------------------------------

Lie = Callable[[dict[str, Tensor]], object]
NAME = "model.layers.0.mlp.up_proj"
BY_NAME = {case.id: case for case in CASES}
TENSORS: dict[str, dict[str, Tensor]] = {}
"""Of whole checkpoints by case: packing them code by code takes its time."""


def put(part: str, change: Callable[[Tensor], Tensor]) -> Lie:
    return lambda tensors: tensors.update({f"{NAME}.{part}": change(tensors[f"{NAME}.{part}"])})


def drop(part: str) -> Lie:
    return lambda tensors: tensors.pop(f"{NAME}.{part}")


def add(part: str, tensor: Tensor) -> Lie:
    return lambda tensors: tensors.update({f"{NAME}.{part}": tensor})


LIES = [
    ("gptq", {}, drop("scales"), f"{NAME}.scales is missing, expected float32 or bfloat16 or float16 [2, 192]"),
    ("gptq", {}, drop("qzeros"), f"{NAME}.qzeros is missing, expected int32 [2, 24]"),
    ("gptq", {}, drop("qweight"), f"missing keys: {NAME}.weight; unexpected keys: {NAME}.g_idx, {NAME}.qzeros, {NAME}.scales"),
    ("gptq", {}, put("qweight", lambda t: t[:-1]), f"{NAME}: its weight has 120 columns, expected whole groups of 64"),
    ("gptq", {}, put("qweight", lambda t: t[:, :-1]), f"{NAME}.qweight has 191 columns, expected a multiple of 8"),
    ("gptq", {}, put("qweight", Tensor.float), f"{NAME}.qweight is float32 [16, 192], expected int32 [any, any]"),
    ("gptq", {}, put("scales", lambda t: t.int()), f"{NAME}.scales is int32 [2, 192], expected float32"),
    ("gptq", {}, put("scales", lambda t: t * torch.nan), f"{NAME}.weight has 384 scales that are NaN or infinite"),
    (
        "gptq",
        {},
        put("g_idx", lambda t: t.flip(0)),
        f"{NAME}.g_idx divides the columns otherwise, expected 64 side by side, as desc_act",
    ),
    ("gptq", {}, put("g_idx", lambda t: t[1:]), f"{NAME}.g_idx is int32 [127], expected int32 [128]"),
    ("gptq", {}, add("weight", torch.zeros(192, 128)), f"{NAME}.weight is there, expected of a quantized layer qweight"),
    ("gptq", {}, add("bias", torch.ones(192)), f"unexpected keys: {NAME}.bias"),
    ("gptq", {"bits": 3}, None, "quantization_config: bits is 3, expected one of (4, 8)"),
    ("gptq", {"bits": 8}, None, "its weight has 96 columns, expected whole groups of 64"),
    ("gptq", {"bits": "4"}, None, "bits is '4', expected one of (4, 8)"),
    ("gptq", {"group_size": 32}, None, ".scales is float16 [3, 128], expected float32 or bfloat16 or float16 [6, 128]"),
    ("gptq", {"group_size": -1}, None, ".scales is float16 [3, 128], expected float32 or bfloat16 or float16 [1, 128]"),
    ("gptq", {"group_size": 0}, None, "group_size is 0, expected a positive number, or -1"),
    ("gptq", {"group_size": 40}, None, "has 192 columns, expected whole groups of 40"),
    ("gptq", {"sym": True}, None, "expected 8, as sym is true"),
    ("gptq", {"sym": 1}, None, "sym is 1, expected one of"),
    ("gptq", {"checkpoint_format": "marlin"}, None, "checkpoint_format is 'marlin', expected one of ('gptq', 'gptq_v2')"),
    (
        "gptq",
        {"checkpoint_format": "gptq", "format": "gptq_v2"},
        None,
        "says the formats ['gptq', 'gptq_v2'], expected one of them",
    ),
    ("gptq", {"dynamic": {"-:.*": {}}}, None, "quantization_config: dynamic is "),
    ("gptq", {"some": 1}, None, "quantization_config has the unknown keys ['some']"),
    ("gptq", {"quant_method": "hqq"}, None, "quant_method is 'hqq', expected one of ('gptq', 'awq', 'compressed-tensors')"),
    ("gptq-desc-act", {}, put("g_idx", lambda t: t + 1), f"{NAME}.weight has columns in the groups 1 to 2, expected 0 to 1"),
    ("gptq-desc-act", {}, put("g_idx", lambda t: t * 0 - 2**31), "expected 0 to 1"),
    ("gptq-desc-act", {}, put("g_idx", lambda t: t * 0), f"{NAME}.weight has groups of 0 to 128 columns, expected of 64 each"),
    ("gptq-desc-act", {}, drop("g_idx"), f"{NAME}.g_idx is missing, expected int32 [128]"),
    ("awq", {"version": "gemv"}, None, "version is 'gemv', expected one of ('gemm', 'GEMM')"),
    ("awq", {"bits": 8}, None, "bits is 8, expected one of (4,)"),
    ("awq", {"zero_point": False}, None, "zero_point is False, expected one of (True,)"),
    ("awq", {}, put("qzeros", lambda t: t[:1]), f"{NAME}.qzeros is int32 [1, 24], expected int32 [2, 24]"),
    ("awq", {}, put("qweight", lambda t: t[:100]), "has 100 columns, expected whole groups of 64"),
    ("ct-int4", {"format": "float-quantized"}, None, "format is 'float-quantized', expected one of ('pack-quantized'"),
    ("ct-int4", {"format": "int-quantized"}, None, "group_0: weights: num_bits is 4, expected one of (8,)"),
    ("ct-int4", {"kv_cache_scheme": {"num_bits": 8}}, None, "kv_cache_scheme is "),
    ("ct-int4", {"transform_config": {"a": 1}}, None, "transform_config is "),
    ("ct-int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, None, "sparsity_config: format is 'sparse-24-bitmask'"),
    ("ct-int4", {"config_groups": []}, None, "config_groups is [], expected schemes by name"),
    ("ct-int4", {"config_groups": {"a": {"targets": "Linear"}}}, None, "quantization_config: a: targets is 'Linear'"),
    (
        "ct-int4",
        {"config_groups": {"a": {"targets": ["re:.*down"], "weights": GROUP | {"type": "int"}}}},
        None,
        "a target in config_groups",
    ),
    (
        "ct-int4",
        {"config_groups": {"a": {"targets": ["re:["], "weights": INT_GROUP}}},
        None,
        "a: targets: '[' is not a regular expression",
    ),
    ("ct-int4", ct({**GROUP, "strategy": "block"}), None, "strategy is 'block', expected one of ('tensor', 'channel', 'group')"),
    ("ct-int4", ct({**GROUP, "strategy": "channel"}), None, "has the strategy 'channel' and the group_size 64, expected both"),
    ("ct-int4", ct({**GROUP, "type": "float"}), None, "type is 'float', expected one of ('int',)"),
    ("ct-int4", ct({**GROUP, "symmetric": False}), None, ".weight_zero_point is missing, expected int32 ["),
    ("ct-int4", {}, add("weight_g_idx", torch.zeros(128)), f"{NAME}.weight_g_idx is there, expected no such tensor, as actorder"),
    (
        "ct-int4",
        {},
        add("weight_global_scale", torch.zeros(1)),
        f"{NAME}.weight_global_scale is there, expected of a quantized layer",
    ),
    ("ct-int4", {}, put("weight_shape", lambda t: t - 1), f"{NAME}.weight_packed is int32 [192, 16], expected int32 [191, 16]"),
    ("ct-int4", {}, put("weight_shape", lambda t: -t), f"{NAME}.weight_shape says [-192, -128], expected sizes [N, K]"),
    ("ct-int4", {}, put("weight_shape", lambda t: t * 2**40), f"{NAME}.weight_shape says "),
    ("ct-int4-asym", ct(GROUP), None, ".weight_zero_point is there, expected no such tensor by the scheme"),
    ("ct-int8", {"format": "pack-quantized"}, None, "num_bits is 8, expected one of (4,)"),
    ("ct-int8", {}, put("weight", Tensor.float), f"{NAME}.weight is float32 [192, 128], expected int8 [any, any]"),
    ("ct-int8", {}, put("weight_scale", lambda t: t[1:]), f"{NAME}.weight_scale is bfloat16 [191, 1], expected"),
    ("ct-int8", {}, add("input_scale", torch.ones(1)), f"{NAME}.input_scale is there, expected of a quantized layer"),
]


@pytest.mark.parametrize(
    ("name", "changes", "lie", "message"), LIES, ids=[f"{name} {message[:40]}" for name, _, _, message in LIES]
)
def test_contradictions(
    make_llama: MakeLlama, tmp_path: Path, name: str, changes: dict[str, Any], lie: Lie | None, message: str
) -> None:
    config, pack = BY_NAME[name].values[:2]
    model = make_llama()
    if name not in TENSORS:
        TENSORS[name], _ = quantized(make_llama(), pack)
    tensors = dict(TENSORS[name])
    if lie is not None:
        lie(tensors)
    save(tmp_path, model, tensors, {**config, **changes})
    before = {key: id(parameter) for key, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_foreign(model, tmp_path)
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == before


def test_truncated(make_llama: MakeLlama, tmp_path: Path) -> None:
    write(make_llama(), tmp_path, AWQ, BY_NAME["awq"].values[1])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_foreign(make_llama(), tmp_path)


def test_layers_that_cannot_hold_one(make_llama: MakeLlama, tmp_path: Path) -> None:
    class Other(nn.Linear):
        pass

    write(make_llama(), tmp_path, AWQ, BY_NAME["awq"].values[1])
    model = make_llama()
    model.model.layers[0].mlp.up_proj = Other(128, 192, bias=False)
    with pytest.raises(ValueError, match=r"up_proj\.weight is quantized, and Other holds it, expected nn\.Linear or nn\.Embedding"):
        load_foreign(model, tmp_path)


def test_groups_are_not_saved_as_something_else(make_llama: MakeLlama, tmp_path: Path) -> None:
    write(make_llama(), tmp_path, AWQ, BY_NAME["awq"].values[1])
    model = make_llama()
    load_foreign(model, tmp_path)
    with pytest.raises(ValueError, match=r"q_proj is held as AffineGroups\(.*\), which q_nn\.QConfig has no word for"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_biases_of_zeros_are_dropped(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    write(model, tmp_path, GPTQ, BY_NAME["gptq"].values[1])
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, f"{NAME}.bias": torch.zeros(192)}, tmp_path / "model.safetensors", {"format": "pt"})
    other = make_llama(seed=1)
    load_foreign(other, tmp_path)
    torch.testing.assert_close(logits(other, ids), logits(model, ids))


def test_zero_points_of_version_1_borrow_across_codes() -> None:
    """Zero is stored as -1 in the whole word, as the writers subtract it."""
    weight = Affine(
        4, np.zeros((8, 32), dtype=np.int64), torch.ones(8, 1).half(), np.arange(8)[:, None] % 3, np.zeros(32, dtype=np.int64)
    )
    reader = gptq_reader.GPTQ.from_dict({**GPTQ, "group_size": 32})
    read = reader.read(Parts("x", gptq(weight, 1)))
    assert read.zero is not None and read.zero.flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_odd_groups_are_dense_or_requantized() -> None:
    weight = GroupedWeight("x", 4, torch.randint(16, (4, 48), dtype=torch.uint8), torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"x: AffineGroups: group_size is 24, .* can be read with requantize="):
        weight.quantized()
    assert weight.quantized(requantize=FourBit()).format == FourBit()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(192, 128), (13, 192)])
def test_what_the_compressed_tensors_package_writes(
    bits: int, group_size: int | None, symmetric: bool, shape: tuple[int, int]
) -> None:
    """Compressed by the package itself; it decodes in the scales' dtype, which rounds once more."""
    pytest.importorskip("compressed_tensors", reason="the peer is in the dependency group «tests»")
    from compressed_tensors.compressors import NaiveQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group_size else "channel", group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    groups = weight.unflatten(1, (-1, group_size or shape[1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    peer: Any = PackedQuantizationCompressor if bits == 4 else NaiveQuantizationCompressor
    compressed = peer.compress(state, scheme)

    format = "pack-quantized" if bits == 4 else "naive-quantized"
    args = json.loads(scheme.weights.model_dump_json())
    reader = reader_for(ct(args, format))
    read = reader.read(Parts("x", compressed)).quantized()
    expected = peer.decompress(compressed, scheme)["weight"]
    assert read.dtype == expected.dtype == torch.float32
    assert ((read.dequantize() - expected).abs() <= NEAR * expected.abs()).all()


def test_settings_as_transformers_writes_them() -> None:
    gptq_config = GPTQConfig(bits=4, group_size=64, desc_act=True, sym=False)
    assert gptq_reader.GPTQ.from_dict(json.loads(json.dumps(gptq_config.to_dict()))) == gptq_reader.GPTQ(4, 64, True, False, 1)
    awq_config = AwqConfig(bits=4, group_size=32)
    assert reader_for(json.loads(json.dumps(awq_config.to_dict()))) == reader_for({**AWQ, "group_size": 32})


def test_a_scheme_that_names_layers_goes_first() -> None:
    config = ct(GROUP)
    named = {"targets": ["re:.*down_proj", "0.mlp.up_proj"], "weights": {**INT_GROUP, "symmetric": False}}
    config["config_groups"]["group_1"] = named
    reader = reader_for(config)
    made = affine(torch.randn(8, 128), 64)
    for name, zeros in (("model.layers.0.mlp.up_proj", True), ("a.down_proj", True), ("model.layers.10.mlp.up_proj", False)):
        weight = reader.read(Parts(name, packed(made, zeros=zeros)))
        assert (weight.zero is not None) == zeros
        with pytest.raises(ValueError, match="weight_zero_point"):
            reader.read(Parts(name, packed(made, zeros=not zeros)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_for_a_whole_weight(symmetric: bool) -> None:
    codes = torch.randint(-128, 128, (5, 64), dtype=torch.int8)
    tensors = {"weight": codes, "weight_scale": torch.tensor([0.25])}
    if not symmetric:
        tensors["weight_zero_point"] = torch.tensor([3], dtype=torch.int8)
    reader = reader_for(ct({"num_bits": 8, "strategy": "tensor", "symmetric": symmetric}, "int-quantized"))
    weight = reader.read(Parts("x", tensors)).quantized()
    torch.testing.assert_close(weight.dequantize(), (codes.float() - (0 if symmetric else 3)) * 0.25, rtol=NEAR, atol=0)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["group", "gptq", "re:(", 4, 64, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(config=st.sampled_from([GPTQ, AWQ, ct(GROUP)]), value=JSON, data=st.data())
def test_whatever_settings_say_they_are_refused_or_read(config: dict[str, Any], value: object, data: st.DataObject) -> None:
    config = json.loads(json.dumps(config))
    places: list[dict[str, Any]] = [config]
    if "config_groups" in config:
        places += [config["config_groups"], config["config_groups"]["group_0"], config["config_groups"]["group_0"]["weights"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from([*place, "format", "dynamic", "other"]))] = value
    try:
        reader = reader_for(config)
    except (ValueError, TypeError):
        return
    layer = Parts("model.layers.0.mlp.up_proj", {part: torch.zeros(8, 8, dtype=torch.int32) for part in reader.parts})
    with pytest.raises(ValueError, match="model"):
        reader.read(layer)
