"""Whole models with fused experts: Mixtral- and Qwen3-MoE-shaped, in transformers' own classes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from q_nn import (
    LoRAConfig,
    LoRALinear,
    QConfig,
    QRule,
    QuantizedExperts,
    QuantizedTensor,
    add_lora,
    quantize,
    weight_bytes,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


def mixtral(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()


def qwen3_moe(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=32, head_dim=16, mlp_only_layers=[1])
    return Qwen3MoeForCausalLM(config).eval()


models = pytest.mark.parametrize("make", [mixtral, qwen3_moe])
Make = Callable[..., PreTrainedModel]


@torch.no_grad()
def with_decoded_weights(make: Make, quantized: nn.Module) -> nn.Module:
    """The dense model in float64, with the weights that the quantized ones stand for."""
    reference = make().double()
    reference.set_experts_implementation("eager")  # the others don't take float64
    values = dict(quantized.named_parameters())
    for name, parameter in reference.named_parameters():
        value = values[name]
        parameter.copy_(value.dequantize() if isinstance(value, QuantizedTensor) else value)
    return reference


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out.double()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@models
@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (QConfig("nf4"), 0.2),
        (QConfig("fp4"), 0.25),
        (QConfig("int8_weight_only"), 0.02),
        (QConfig("nf4", rules=(QRule("experts", "mxfp4"),)), 0.25),
        (QConfig("int8_weight_only", rules=(QRule("experts", "fp8"),)), 0.05),
    ],
    ids=["nf4", "fp4", "int8", "nf4 and mxfp4", "int8 and fp8"],
)
def test_outputs(make: Make, ids: Tensor, config: QConfig, limit: float) -> None:
    """Exactly what the decoded weights give, and near the dense model. (Random weights: a router may choose another expert.)"""
    model = make()
    dense = logits(model, ids)
    before = weight_bytes(model)
    report = quantize(model, config)
    experts = [name for name, module in model.named_modules() if isinstance(module, QuantizedExperts)]
    assert {layer.name for layer in report.quantized if layer.kind == "fused experts"} == set(experts) != set()
    router = {parameter.name: parameter.reason for parameter in report.kept}["model.layers.0.mlp.gate.weight"]
    assert router.endswith("Router is no linear layer, embedding or fused experts")
    assert report.bytes_after == weight_bytes(model) < before * 0.5
    got = logits(model, ids)
    assert relative_error(got, logits(with_decoded_weights(make, model), ids)) < 1e-5
    assert relative_error(got, dense) < limit


@models
def test_state_dict(make: Make, ids: Tensor) -> None:
    model, other = make(), make(seed=1)
    for either in (model, other):
        quantize(either, QConfig("nf4", rules=(QRule("experts", "int8_weight_only"),)))
    state = model.state_dict()
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in state.values())
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj.SCB"} <= set(state)
    other.load_state_dict(state)
    assert torch.equal(logits(other, ids), logits(model, ids))


@models
def test_training_attention_and_router(make: Make, ids: Tensor) -> None:
    """Steps of LoRA over the attention, and of the router; its gradient against the decoded weights in float64."""
    model = make().train()
    quantize(model, QConfig("nf4"))
    reference = with_decoded_weights(make, model).train()
    trainable = add_lora(model, LoRAConfig(rank=4, target=("q_proj", "k_proj", "v_proj", "o_proj")))
    router = model.get_parameter("model.layers.0.mlp.gate.weight").requires_grad_()
    optimizer = torch.optim.AdamW([*trainable, router], lr=1e-2)

    losses = []
    for step in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:  # the adapters start as nothing
            expected = reference.get_parameter("model.layers.0.mlp.gate.weight")
            reference(input_ids=ids, labels=ids).loss.backward()
            assert router.grad is not None and expected.grad is not None
            assert relative_error(router.grad.double(), expected.grad) < 1e-4
        assert all(parameter.grad is not None for parameter in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.95
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 8


def test_gradient_checkpointing(ids: Tensor) -> None:
    model = mixtral().train()
    quantize(model, QConfig("nf4"))
    add_lora(model, LoRAConfig(rank=4, target=("q_proj",)))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.adapters["default"].lora_B.weight, std=0.1)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == 4
    for without, with_ in zip(*gradients, strict=True):
        torch.testing.assert_close(with_, without)


def test_experts_in_a_list_are_linear_layers() -> None:
    """As other libraries and older checkpoints have them."""
    experts = nn.ModuleList(nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in ("w1", "w2", "w3")}) for _ in range(3))
    model = nn.ModuleDict({"experts": experts, "gate": nn.Linear(64, 3)})
    report = quantize(model, QConfig("nf4", skip=("gate",), rules=(QRule(r"experts\.\d+\.w2", "int8"),)))
    assert [layer.format for layer in report.quantized if layer.name.endswith("w2")] == ["int8, threshold 6"] * 3
    assert len(report.quantized) == 9
