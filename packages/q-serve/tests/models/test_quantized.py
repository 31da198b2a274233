"""Quantized directories: ours, and those that transformers writes with the bitsandbytes wheel."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import q_nn
from q_serve.build import build
from q_serve.core.request import Request
from q_serve.core.sampling import SamplingParams
from q_serve.engine import Engine
from q_serve.errors import ModelError
from q_serve.options import EngineOptions

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 320, (length,), generator=generator).tolist() for length in (3, 20, 41)]


@torch.no_grad()
def generate(model: Any, prompt: list[int]) -> list[int]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
    return list(ids[0, len(prompt) :].tolist())


def load(directory: Path) -> Engine:
    return build(EngineOptions(model=directory, dtype="float32", num_blocks=64, block_size=8, max_batch_tokens=24)).engine


def serve(engine: Engine) -> list[list[int]]:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts())]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return [list(request.output_tokens) for request in requests]


@pytest.mark.parametrize(
    "config",
    [
        q_nn.QConfig(format="nf4", double_quant=True),
        q_nn.QConfig(format="nf4", double_quant=False),
        q_nn.QConfig(format="fp4"),
        q_nn.QConfig(format="int8", threshold=0.0),
    ],
    ids=lambda config: f"{config.format}{'-nested' if config.double_quant else ''}",
)
def test_what_q_nn_saves(config: q_nn.QConfig, dense: LlamaForCausalLM, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = copy.deepcopy(dense)
    q_nn.quantize(model, config)
    q_nn.save_pretrained(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = load(tmp_path)
    kinds = {type(module).__name__ for module in engine._runner.model.modules()}  # type: ignore[attr-defined]
    assert ("Linear8bitLt" if config.format == "int8" else f"Linear{config.format.upper()}") in kinds
    assert serve(engine) == [generate(model, prompt) for prompt in prompts()]


def test_a_threshold_of_outliers_makes_no_request_hang_on_its_neighbours(
    dense: LlamaForCausalLM, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = copy.deepcopy(dense)
    q_nn.quantize(model, q_nn.QConfig("int8"))  # with the usual threshold
    q_nn.save_pretrained(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = load(tmp_path)
    kinds = {type(module).__name__ for module in engine._runner.model.modules()}  # type: ignore[attr-defined]
    assert "LinearInt8" in kinds and "Linear8bitLt" not in kinds
    weight_only = copy.deepcopy(dense)
    q_nn.quantize(weight_only, q_nn.QConfig("int8_weight_only"))
    assert serve(engine) == [generate(weight_only, prompt) for prompt in prompts()]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_transformers_saves_with_bitsandbytes(
    quant_type: str, dense: LlamaForCausalLM, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    dense.save_pretrained(tmp_path / "dense")
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        ),
    )
    # Before any forward: the peer's repacks its weights in place, and computes in bfloat16 whatever it is told.
    peer.save_pretrained(tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    decoded = copy.deepcopy(dense)
    with torch.no_grad():
        for name, module in peer.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                decoded.get_submodule(name).weight.copy_(weight)
    assert serve(load(tmp_path / "quantized")) == [generate(decoded, prompt) for prompt in prompts()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"load_in_8bit": True}, "load_in_4bit is True and load_in_8bit is True"),
        ({"something": 1}, "something"),
    ],
)
def test_other_quantizations_are_refused(
    change: dict[str, Any], message: str, dense: LlamaForCausalLM, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = copy.deepcopy(dense)
    q_nn.quantize(model, q_nn.QConfig(format="nf4"))
    q_nn.save_pretrained(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load(tmp_path)
