"""Mixture-of-experts models, whose experts transformers 5 fuses while it loads: quantized there, saved, loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import q_nn.hf
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import QConfig, QRule, QuantizedExperts, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen2() -> PreTrainedModel:
    """With an expert that all tokens share, of ordinary linear layers that are called as the others' parameters are."""
    config = Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64)
    return Qwen2MoeForCausalLM(config)


def qwen3() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64, head_dim=16))


MODELS = [mixtral, qwen2, qwen3]
models = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
CONFIGS = [
    QConfig("nf4"),
    QConfig("fp4", blocksize=32, double_quant=False),
    QConfig("int8", threshold=0.0),
    QConfig("nf4", rules=(QRule(".*experts", "fp8"),)),
]


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def title(value: Callable[[], PreTrainedModel] | QConfig) -> str:
    """Part of a test's name, the same in every process."""
    return str(value) if isinstance(value, QConfig) else value.__name__


def keys(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    ("make", "config"), [*((make, CONFIGS[0]) for make in MODELS), *((qwen2, config) for config in CONFIGS[1:])], ids=title
)
def test_experts_there_and_back(make: Callable[[], PreTrainedModel], ids: Tensor, tmp_path: Path, config: QConfig) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "dense")
    assert any("experts.0." in key for key in keys(tmp_path / "dense"))  # one tensor an expert, as such models are published
    quantize(model, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert {n: type(m) for n, m in loaded.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert sum(isinstance(module, QuantizedExperts) for module in loaded.modules()) == 2
    assert torch.equal(logits(loaded, ids), logits(model, ids))

    loaded.save_pretrained(tmp_path / "quantized")
    assert not any("experts.0." in key for key in keys(tmp_path / "quantized"))  # they stay stacked
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again, ids), logits(model, ids))
    for (name, a), (other, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert (name, type(a)) == (other, type(b))
        assert torch.equal(a, b)

    q_nn.hf.adopt(model).save_pretrained(tmp_path / "adopted")
    assert keys(tmp_path / "adopted") == keys(tmp_path / "quantized")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adopted"), ids), logits(model, ids))


@models
def test_experts_that_a_rule_leaves_dense_are_saved_as_they_were(
    make: Callable[[], PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "dense")
    config = QConfig(rules=(QRule(".*experts", None),))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    loaded.save_pretrained(tmp_path / "quantized")
    assert {key for key in keys(tmp_path / "dense") if "experts." in key} <= keys(tmp_path / "quantized")
    # Without them it is what bitsandbytes makes of such a model, and so is the dialect.
    assert torch.equal(logits(q_nn.hf.from_pretrained(tmp_path / "quantized"), ids), logits(loaded, ids))


@models
def test_training_reaches_what_is_before_the_experts(make: Callable[[], PreTrainedModel], ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QConfig()).train()
    model.model.embed_tokens.weight.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    gate = model.model.layers[0].mlp.gate.weight
    assert not isinstance(gate, QuantizedTensor)
    assert gate.grad is not None and bool(gate.grad.any())
    assert bool(model.model.embed_tokens.weight.grad.any())
