"""LoRA over dense and quantized layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import LoRAConfig, LoRALinear, QConfig, add_lora, merge_lora, quantize

MakeLlama = Callable[..., LlamaForCausalLM]
formats = pytest.mark.parametrize("format", [None, "nf4", "fp4", "int8"])


def fill(model: nn.Module) -> None:
    """Adapters that do something."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B.weight, std=0.05)


@formats
def test_output_is_base_plus_scaled_update(format: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    if format:
        quantize(model, QConfig(format))
    base = model[0]
    trainable = add_lora(model, LoRAConfig(rank=4, alpha=6.0))
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), base(x))
    fill(model)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.lora_A.weight.T @ layer.lora_B.weight.T * 1.5)
    assert [p.shape for p in trainable] == [(4, 64), (32, 4)]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_A.weight", "0.lora_B.weight"]
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


@pytest.mark.parametrize(("format", "reentrant"), [(None, True), ("nf4", True), ("nf4", False), ("int8", True), ("int8", False)])
def test_trains_a_llama_with_checkpointing(make_llama: MakeLlama, ids: Tensor, format: Any, reentrant: bool) -> None:
    """The gradients are the same whether activations are kept or computed again, and the loss falls."""
    gradients = []
    for checkpointing in (False, True):
        model = make_llama().train()
        if format:
            quantize(model, QConfig(format))
        torch.manual_seed(0)
        trainable = add_lora(model, LoRAConfig(rank=4))
        fill(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in trainable])
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients[-1])
    torch.testing.assert_close(gradients[0], gradients[1])

    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optimizer = torch.optim.AdamW(trainable, lr=5e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters() if name in base)


@formats
def test_merge(make_llama: MakeLlama, ids: Tensor, format: Any) -> None:
    model = make_llama()
    if format:
        quantize(model, QConfig(format))
    add_lora(model, LoRAConfig(rank=4))
    fill(model)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    expected = {}
    for name, module in adapted.items():
        weight = module.weight
        dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.detach().clone()
        expected[name] = dense + module.lora_B.weight.detach() @ module.lora_A.weight.detach() * module.scaling
    with torch.no_grad():
        before = model(ids).logits
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    for name, dense in expected.items():
        weight = model.get_submodule(name).weight
        if isinstance(weight, QuantizedTensor):
            assert torch.equal(weight, QuantizedTensor.quantize(dense, weight.format))
        else:
            torch.testing.assert_close(weight, dense)
    if not format:
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, before)


def test_targets(make_llama: MakeLlama) -> None:
    def adapted(target: Any) -> set[str]:
        model = make_llama()
        add_lora(model, LoRAConfig(target=target))
        return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}

    assert len(adapted("all-linear")) == 14
    assert adapted(("q_proj", "layers.0.mlp.up_proj")) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }
    assert adapted(r".*layers\.1.*_proj") == {name for name in adapted("all-linear") if ".1." in name}
    assert adapted(("lm_head",)) == {"lm_head"}
    with pytest.raises(ValueError, match="means no linear layer"):
        adapted(("proj",))
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied"):
        add_lora(make_llama(tied=True), LoRAConfig(target=("lm_head",)))


def test_dropout_is_for_training_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    add_lora(model, LoRAConfig(dropout=0.5))
    fill(model)
    x = torch.randn(3, 64)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_state_dict_copy_and_pickle(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama()
    quantize(model, QConfig())
    add_lora(model, LoRAConfig())
    fill(model)
    with torch.no_grad():
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, expected)
        other = make_llama(seed=1)
        quantize(other, QConfig())
        add_lora(other, LoRAConfig())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids).logits, expected)


def test_misuse() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(ValueError, match="no adapters"):
        merge_lora(model)
    add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="already"):
        add_lora(model, LoRAConfig())
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        layer.lora_B.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="adapter of 0"):
        merge_lora(model)
    assert model[0] is layer


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": 2.0}, ValueError),
        ({"alpha": 0}, ValueError),
        ({"alpha": float("inf")}, ValueError),
        ({"dropout": 1.0}, ValueError),
        ({"target": "("}, ValueError),
        ({"target": ()}, TypeError),
        ({"target": ["q_proj"]}, TypeError),
        ({"r": 8}, TypeError),
    ],
)
def test_config_is_checked(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        LoRAConfig(**settings)
