"""Types whose scales are held in a byte, and quantized embeddings, on two real processes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from q_core.formats.codebooks import FourBitType
from q_core.formats.four_bit import FourBit
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.formats.sharding import local_shard
from q_nn import Embedding4bit, Linear4bit, LoRAConfig, add_lora
from two_ranks import on_two_ranks, two_ranks  # noqa: F401

types = pytest.mark.parametrize(("quant_type", "bits"), [("mxfp4", 5), ("nvfp4", 6), ("int4", 4.5)])


def make_model(quant_type: FourBitType, seed: int = 0) -> nn.Sequential:
    """An embedding and a linear layer with adapters that aren't zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(Embedding4bit(48, 64, quant_type=quant_type), Linear4bit(64, 32, quant_type=quant_type))
    for parameter in add_lora(model, LoRAConfig(rank=2)):
        nn.init.normal_(parameter, std=0.05)
    return model


def shard(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,))
    for module in model:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model(ids).pow(2).mean().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in found]


@types
@on_two_ranks
def test_training_equals_the_single_process(quant_type: FourBitType, bits: float) -> None:
    ids = torch.randint(48, (8, 3), generator=torch.Generator().manual_seed(1))
    single = make_model(quant_type)
    model = shard(copy.deepcopy(single))
    for parameter in model.parameters():
        if (held := local_shard(parameter)) is not None:
            assert held.format == FourBit.of(quant_type).resolved_format
            assert held.stored_bytes * 8 == bits * held.numel()
    expected = gradients(single, ids)
    ours = gradients(model, ids.chunk(2)[dist.get_rank()])
    assert len(ours) == len(expected) == 2
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@types
@on_two_ranks
def test_state_dict_of_two_loads_into_one_and_back(quant_type: FourBitType, bits: float) -> None:
    source = make_model(quant_type)
    state = get_model_state_dict(shard(copy.deepcopy(source)), options=StateDictOptions(full_state_dict=True))
    ids = torch.randint(48, (8, 3))
    if dist.get_rank() == 0:
        assert state["0.weight.absmax"].dtype == torch.float32
        one = make_model(quant_type, seed=1)
        one.load_state_dict(state)
        weight = one[0].weight
        assert isinstance(weight, QuantizedTensor) and weight.format == FourBit.of(quant_type).resolved_format
        assert torch.equal(one(ids), source(ids))
    two = shard(make_model(quant_type, seed=1))
    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(two, source.state_dict(), options=whole)  # scales in bytes, alike on every rank
    for ours, theirs in ((two[0].weight, source[0].weight), (two[1].base_layer.weight, source[1].base_layer.weight)):
        assert torch.equal(ours.full_tensor().dequantize(), theirs.dequantize())
