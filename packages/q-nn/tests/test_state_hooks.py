"""State dicts of quantized modules: what users do with them on one process, besides strict loading (test_linear.py)."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import nn

from q_core.formats.four_bit import FourBit
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import Linear8bitLt, LinearNF4, LoRAConfig, add_lora, prepare

MAKERS: dict[str, Callable[[], nn.Linear]] = {
    "nf4": lambda: LinearNF4(64, 64, double_quant=False),
    "nf4 double": lambda: LinearNF4(64, 64),
    "int8": lambda: Linear8bitLt(64, 64),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def model(make: Callable[[], nn.Linear], *, lora: bool = False) -> nn.Sequential:
    layers = nn.Sequential(make(), nn.ReLU(), make())
    if lora:
        for parameter in add_lora(layers, LoRAConfig(rank=2)):
            nn.init.normal_(parameter)
    return layers


@makers
@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_weights_frozen_and_adapters_training(make: Callable[[], nn.Linear], assign: bool) -> None:
    source, target = model(make, lora=True), model(make, lora=True)
    x = torch.randn(3, 64)
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(target(x), source(x))
    for name, parameter in target.named_parameters():
        assert parameter.requires_grad == ("lora" in name), name
        assert isinstance(parameter, nn.Parameter)


@makers
def test_state_dict_is_plain_tensors_that_safetensors_takes(make: Callable[[], nn.Linear]) -> None:
    source, target = model(make), model(make)
    state = source.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    target.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)))
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x))


@makers
def test_torch_save_reads_back_as_weights_only(make: Callable[[], nn.Linear]) -> None:
    source, target = model(make), model(make)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x))


@makers
def test_meta_device_comes_alive_by_assignment_or_by_to_empty(make: Callable[[], nn.Linear]) -> None:
    source, x = model(make), torch.randn(3, 64)
    with torch.device("meta"):
        assigned, emptied = model(make), model(make)
    assigned.load_state_dict(source.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(source.state_dict())
    for target in (assigned, emptied):
        assert torch.equal(target(x), source(x))
        assert not any(parameter.is_meta for parameter in target.parameters())


@makers
def test_a_module_that_loaded_moves_and_trains_on(make: Callable[[], nn.Linear]) -> None:
    """Moving swaps tensors, which a weak reference left by any of this would forbid."""
    source, target = model(make, lora=True), model(make, lora=True)
    target(torch.randn(3, 64)).sum().backward()
    target.load_state_dict(source.state_dict())
    target.to(torch.bfloat16).to(torch.float32)
    target(torch.randn(3, 64)).sum().backward()
    first = target[0].base_layer.weight
    assert isinstance(first, QuantizedTensor)
    assert torch.equal(first.dequantize(), source[0].base_layer.weight.to(torch.bfloat16).to(torch.float32).dequantize())


def test_state_dict_shares_memory_and_keeps_up() -> None:
    layer = LinearNF4(64, 64, double_quant=False)
    state = layer.state_dict()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 64))
    assert torch.equal(state["weight"], layer.state_dict()["weight"])


def test_a_plain_module_of_another_weight_name_keeps_its_keys() -> None:
    """Attention's in_proj_weight has no ``weight`` for siblings; 4-bit keys go under its own name."""

    def attention(seed: int) -> nn.MultiheadAttention:
        torch.manual_seed(seed)
        module = prepare(nn.MultiheadAttention(64, 2, batch_first=True))
        weight = QuantizedTensor.quantize(module.in_proj_weight, FourBit())
        module.in_proj_weight = nn.Parameter(weight, requires_grad=False)
        return module

    source, target = attention(0), attention(1)
    state = source.state_dict()
    assert "in_proj_weight.absmax" in state
    target.load_state_dict(state)
    assert isinstance(target.in_proj_weight, QuantizedTensor)
    assert torch.equal(target.in_proj_weight.dequantize(), source.in_proj_weight.dequantize())
