"""LinearGroupedInt as a module: trained beside, merged, saved, loaded, copied."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from q_core.formats.grouped_int import GroupedInt
from q_nn import AffineGroups, LinearGroupedInt, LinearNF4, LoRAConfig, QuantizedTensor, SuperGroups, add_lora, merge_lora, prepare

FORMATS = [AffineGroups(group_size=64), AffineGroups(8, 32, zeros=False), AffineGroups(4, 32, True), SuperGroups()]
formats = pytest.mark.parametrize("format", FORMATS, ids=str)


def make(format: GroupedInt, bias: bool = True) -> LinearGroupedInt:
    torch.manual_seed(0)
    return LinearGroupedInt(256, 12, bias, format=format)  # type: ignore[arg-type]


@formats
def test_state_dicts(format: GroupedInt) -> None:
    layer, x = make(format), torch.randn(3, 256)
    state = load(save(layer.state_dict()))
    for other in (LinearGroupedInt(256, 12), prepare(nn.Linear(256, 12)), LinearGroupedInt(256, 12, device="meta")):
        other.load_state_dict(state, assign=other.weight.is_meta)
        assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match=r"is held as \w+Groups\(.*, which LinearNF4 doesn't take"):
        LinearNF4(256, 12).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"which LinearGroupedInt doesn't take"):
        layer.load_state_dict(LinearNF4(256, 12).state_dict())
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert f"format={format}" in repr(layer)


@formats
def test_a_dense_weight_is_quantized_as_it_is_loaded(format: GroupedInt) -> None:
    layer, dense = make(format), nn.Linear(256, 12)
    layer.load_state_dict(dense.state_dict())
    expected = QuantizedTensor.quantize(dense.weight, format).dequantize()
    assert isinstance(layer.weight, QuantizedTensor) and torch.equal(layer.weight.dequantize(), expected)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters(format: GroupedInt, dtype: torch.dtype) -> None:
    model = nn.Sequential(make(format)).to(dtype)
    x, target = torch.randn(8, 256, dtype=dtype), torch.randn(8, 12, dtype=dtype)
    trainable = add_lora(model, LoRAConfig(rank=4))
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    before = model(x)
    merge_lora(model)
    weight = model[0].weight
    assert isinstance(weight, QuantizedTensor) and weight.format == format
    assert (model(x) - before).square().mean() < before.square().mean() / 20  # rounded to 4 bits again
