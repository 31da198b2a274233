"""Directories and settings of bitsandbytes', through transformers, served by this package's layers; and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

import q_nn.hf
from q_core.formats.int8_rows import Int8Rows
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.specs.bounds import FACTOR
from q_nn import Linear8bitLt, LinearFP4, LinearNF4, QConfig, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
MakeLlama = Callable[..., LlamaForCausalLM]
SETTINGS = [
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, LinearNF4),
    ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, LinearFP4),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "up_proj"]}, LinearNF4),
    ({"load_in_8bit": True}, Linear8bitLt),
]
settings = pytest.mark.parametrize(("settings", "layer"), SETTINGS, ids=str)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits.float()
    return out


def limit(reference: Tensor, dtype: torch.dtype = torch.float32, roundings: int = 32) -> float:
    """How far two ways to compute the same logits may be apart, after about that many roundings one after the other."""
    return reference.abs().max().item() * roundings * FACTOR[dtype] * torch.finfo(dtype).eps


@pytest.fixture
def served() -> Iterator[None]:
    q_nn.hf.serve_bitsandbytes()
    yield
    q_nn.hf.serve_bitsandbytes(False)


def dense_copy(model: nn.Module, make: Callable[[], LlamaForCausalLM]) -> LlamaForCausalLM:
    """A dense model with the weights that the other one's layers decode to: 4 bits by its own library, int8 rows by ours."""
    dense = make()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedTensor):
            decoded = weight.dequantize()
        elif isinstance(weight, bnb.nn.Params4bit):
            decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(weight, bnb.nn.Int8Params):
            components = {"codes": weight.data, "absmax": weight.SCB}
            decoded = QuantizedTensor.from_components(components, Int8Rows(), shape=weight.shape, dtype=torch.float32).dequantize()
        else:
            continue
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(decoded)
    return dense


@settings
def test_directories_that_the_wheel_made(
    make_llama: MakeLlama, ids: Tensor, tmp_path: Path, settings: dict[str, Any], layer: type[nn.Module]
) -> None:
    tied = layer is LinearNF4  # a head that is tied is quantized nowhere
    make_llama(tied=tied).save_pretrained(tmp_path / "dense")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=BitsAndBytesConfig(**settings)
    ).train()
    theirs.save_pretrained(tmp_path / "quantized")
    ours = q_nn.hf.from_pretrained(tmp_path / "quantized", device_map="cpu")
    names = {name for name, module in theirs.named_modules() if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}
    assert names == {name for name, module in ours.named_modules() if isinstance(module, layer)}
    expected = logits(dense_copy(theirs, lambda: make_llama(tied=tied)), ids)
    assert torch.equal(logits(dense_copy(ours, lambda: make_llama(tied=tied)), ids), expected)
    if layer is not Linear8bitLt:  # which rounds activations
        assert (logits(ours, ids) - expected).abs().max().item() <= limit(expected)

    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert names == {name for name, module in again.named_modules() if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}
    assert torch.equal(logits(dense_copy(again, lambda: make_llama(tied=tied)), ids), expected)


@settings
@pytest.mark.usefixtures("served")
def test_their_settings_quantize_with_our_layers(
    make_llama: MakeLlama, ids: Tensor, tmp_path: Path, settings: dict[str, Any], layer: type[nn.Module]
) -> None:
    make_llama().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(**settings)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert sum(type(module) is layer for module in ours.modules()) == (12 if "llm_int8_skip_modules" in settings else 14)
    ours.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized"), ids), logits(ours, ids))
    q_nn.hf.serve_bitsandbytes(False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    assert torch.equal(logits(dense_copy(theirs, make_llama), ids), logits(dense_copy(ours, make_llama), ids))


def test_what_transformers_saved_of_ours_loads_in_the_wheel(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path / "dense")
    for config in (QConfig("nf4"), QConfig("fp4", double_quant=False), QConfig("int8")):
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
        ours.save_pretrained(tmp_path / "quantized", max_shard_size="100KB")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
        assert any(isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for module in theirs.modules())
        assert torch.equal(logits(dense_copy(theirs, make_llama), ids), logits(dense_copy(ours, make_llama), ids))


@pytest.mark.usefixtures("served")
def test_settings_that_are_not_supported_are_named(make_llama: MakeLlama, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bnb_4bit_quant_type is 'nf3'"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf3")
        )


def test_serving_ends(make_llama: MakeLlama, tmp_path: Path) -> None:
    quantize(model := make_llama(), QConfig())
    q_nn.save_pretrained(model, tmp_path)
    for serve, layer in ((True, LinearNF4), (False, bnb.nn.Linear4bit)):
        q_nn.hf.serve_bitsandbytes(serve)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert sum(isinstance(module, layer) for module in loaded.modules()) == 14
