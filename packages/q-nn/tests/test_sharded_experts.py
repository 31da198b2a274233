"""Fused experts on two real processes: fully_shard gives each some experts, and gathers them for the forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from q_core import FourBit, Fp8Rows, Int8Rows, QuantizedTensor
from q_core.formats.sharding import local_shard
from q_core.formats.weight_format import WeightFormat
from q_nn import QuantizedExperts
from two_ranks import on_two_ranks, two_ranks  # noqa: F401

E, N, K = 4, 16, 32
FORMATS = [FourBit("nf4", 64), FourBit("nf4", 64, 256), FourBit("mxfp4", 32), Int8Rows(), Fp8Rows()]
formats = pytest.mark.parametrize("format", FORMATS, ids=str)


class Layer(nn.Module):
    """A router that trains, and experts that don't."""

    def __init__(self, format: WeightFormat, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.router = nn.Linear(K, E)
        self.experts = QuantizedExperts(
            QuantizedTensor.quantize(torch.randn(E, 2 * N, K) * 0.3, format),
            QuantizedTensor.quantize(torch.randn(E, K, N) * 0.3, format),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        out: Tensor = self.experts(x, ids, weights)
        return out


def shard(layer: Layer) -> Layer:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(layer.experts, mesh=mesh)
    fully_shard(layer, mesh=mesh)
    return layer


@formats
@on_two_ranks
def test_output_and_the_routers_gradient(format: WeightFormat) -> None:
    single, sharded = Layer(format), shard(Layer(format))
    x = torch.randn(6, K)
    outputs = []
    for layer in (single, sharded):
        output = layer(x)
        output.square().mean().backward()
        outputs.append(output.detach())
    assert torch.equal(*outputs)
    gradient = sharded.router.weight.grad
    assert isinstance(gradient, DTensor) and single.router.weight.grad is not None
    torch.testing.assert_close(gradient.full_tensor(), single.router.weight.grad)
    held = local_shard(sharded.experts.gate_up_proj)
    assert held is not None
    sharded.experts.reshard()  # type: ignore[operator]
    held = local_shard(sharded.experts.gate_up_proj)
    assert held is not None
    assert held.shape == (E // 2, 2 * N, K)


@pytest.mark.parametrize("format", FORMATS[:-1], ids=str)  # gloo gathers no float8; a forward gathers bytes
@on_two_ranks
def test_state_dict_is_the_whole_models_in_dtensors(format: WeightFormat) -> None:
    single, sharded = Layer(format), shard(Layer(format))
    whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in sharded.state_dict().items()}
    loaded = Layer(format.resolved_format, seed=1)
    loaded.load_state_dict(whole)
    assert whole.keys() == loaded.state_dict().keys()
    x = torch.randn(6, K)
    assert torch.equal(loaded(x), single(x))


@formats
@on_two_ranks
def test_state_dict_loads_into_another_sharded_one(format: WeightFormat) -> None:
    x = torch.randn(6, K)
    other = shard(Layer(format, seed=1))
    other.load_state_dict(shard(Layer(format)).state_dict())
    assert torch.equal(other(x), Layer(format)(x))


@on_two_ranks
def test_experts_that_do_not_divide_are_refused() -> None:
    gate_up_proj, down_proj = (QuantizedTensor.quantize(torch.ones(*shape), Int8Rows()) for shape in ((3, 8, 4), (3, 4, 4)))
    with pytest.raises(ValueError, match=r"\[3, 8, 4\] doesn't divide into shards of 2 rows"):
        fully_shard(QuantizedExperts(gate_up_proj, down_proj), mesh=init_device_mesh("cpu", (2,)))
