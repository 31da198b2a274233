"""GPTQ, AWQ and compressed-tensors: files as their formats define them, packed here code by code, against float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from q_nn import FourBit, Linear4bit, Linear8bitLt, QuantizedTensor, load_into
from q_nn.linear_grouped import LinearGroupedInt
from q_nn.readers import read_weights
from q_nn.readers.load import load_foreign

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
        Linear8bitLt,
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


def write(model: LlamaForCausalLM, directory: Path, config: dict[str, Any], pack: Pack) -> dict[str, Tensor]:
    """Save a model with its layers' linears quantized; gives what they decode to, and puts that into the model."""
    tensors = dict(model.state_dict())
    decoded: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            made, parts = pack(module.weight)
            del tensors[f"{name}.weight"]
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            decoded[f"{name}.weight"] = made.dense
            module.weight = nn.Parameter(made.dense.to(module.weight.dtype))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    description = {**json.loads(model.config.to_json_string()), "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(description))
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
