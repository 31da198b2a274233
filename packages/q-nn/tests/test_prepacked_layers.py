"""Layers whose weight is held in a backend's private layout: the same products, and state dicts that nobody can tell apart."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from q_core import use_backends
from q_core.layouts import CANONICAL
from q_core.testing.private_layout import LAYOUT, private_layout
from q_nn import (
    FourBit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    LoRAConfig,
    LoRALinear,
    QConfig,
    QuantizedTensor,
    merge_lora,
    quantize,
    save_pretrained,
    unmerge_lora,
    weight_bytes,
)

MAKERS: dict[str, Callable[[], nn.Linear]] = {
    "nf4": lambda: LinearNF4(64, 32, double_quant=False),
    "nf4 double": lambda: LinearNF4(64, 32),
    "fp4": lambda: LinearFP4(64, 32),
    "int8": lambda: Linear8bitLt(64, 32),
    "int8 outliers": lambda: Linear8bitLt(64, 32, threshold=0.5),  # most columns, so that no layout gathers them
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture(autouse=True)
def acme() -> Iterator[None]:
    with private_layout():
        yield


def prepack(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, QuantizedTensor):
            module.weight = module.weight.prepack(LAYOUT)


def held(layer: nn.Module) -> QuantizedTensor:
    assert isinstance(layer.weight, QuantizedTensor)
    return layer.weight


def plain_scales(make: Callable[[], nn.Linear]) -> nn.Linear:
    """A layer whose scales are decoded, as prepacking leaves them."""
    layer = make()
    layer.weight = held(layer).prepack(LAYOUT).unpack()
    return layer


@makers
def test_products_and_gradients_are_the_same(make: Callable[[], nn.Linear]) -> None:
    layer, x = make(), torch.randn(2, 3, 64, requires_grad=True)
    results = []
    for _ in range(2):
        out = layer(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, layer.bias))))
        prepack(layer)
    assert held(layer).component_layout == LAYOUT
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    with torch.no_grad():
        assert torch.equal(layer(x), results[0][0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))
    assert f"layout='{LAYOUT}'" in repr(held(layer))


def test_products_are_the_backends_own() -> None:
    layer, x = LinearNF4(64, 32), torch.randn(3, 64)
    expected = layer(x)
    prepack(layer)
    with use_backends("acme"):
        assert torch.equal(layer(x), expected)


@makers
def test_state_dicts_copies_and_pickles_are_canonical(make: Callable[[], nn.Linear]) -> None:
    layer = plain_scales(make)
    before, x = layer.state_dict(), torch.randn(3, 64)
    prepack(layer)
    after, expected = layer.state_dict(), layer(x)
    assert list(after) == list(before)
    assert all(type(value) is Tensor and torch.equal(value, before[key]) for key, value in after.items())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to(torch.bfloat16).float()):
        assert held(other).component_layout == CANONICAL
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items() if key != "bias")
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert held(layer).component_layout == LAYOUT


@makers
@pytest.mark.parametrize("source_is_prepacked", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_prepacked_layer(make: Callable[[], nn.Linear], source_is_prepacked: bool, assign: bool) -> None:
    source, target, x = make(), make(), torch.randn(3, 64)
    expected = source(x)
    prepack(target)
    if source_is_prepacked:
        prepack(source)
    assert not torch.equal(target(x), expected)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(target(x), expected)
    # Copied into, a weight keeps its layout; what is assigned is as a checkpoint holds it.
    assert held(target).component_layout == (CANONICAL if assign else LAYOUT)
    assert not target.weight.requires_grad


def test_loading_dense_weights_and_other_blocksizes() -> None:
    target, dense, x = LinearNF4(64, 32), nn.Linear(64, 32), torch.randn(3, 64)
    prepack(target)
    target.load_state_dict(dense.state_dict())
    assert held(target).component_layout == LAYOUT
    assert torch.equal(target(x), LinearNF4.from_linear(dense, double_quant=False)(x))
    other = LinearNF4(64, 32, blocksize=128, double_quant=False)
    target.load_state_dict(other.state_dict())  # another format is another weight
    assert (held(target).component_layout, held(target).format) == (CANONICAL, FourBit("nf4", 128))
    assert torch.equal(target(x), other(x))


@makers
def test_adapters_merge_into_a_prepacked_layer(make: Callable[[], nn.Linear]) -> None:
    results = []
    base = plain_scales(make)
    for layout in (CANONICAL, LAYOUT):
        torch.manual_seed(0)
        model = nn.Sequential(LoRALinear(copy.deepcopy(base), LoRAConfig(rank=2)))
        nn.init.normal_(model[0].adapters["default"].lora_B.weight)
        if layout == LAYOUT:
            prepack(model)
        merge_lora(model, reversible=True)
        assert held(model[0].merged_layer).component_layout == layout
        unmerge_lora(model)
        assert held(model[0].base_layer).component_layout == layout
        merge_lora(model)
        assert held(model[0]).component_layout == layout
        results.append(held(model[0]).dequantize())
    assert torch.equal(*results)


@makers
def test_reset_and_memory(make: Callable[[], nn.Linear]) -> None:
    layer = plain_scales(make)
    before, total = held(layer).dequantize(), weight_bytes(layer)
    prepack(layer)
    assert weight_bytes(layer) == total
    layer.reset_parameters()  # type: ignore[operator]
    assert held(layer).component_layout == LAYOUT
    assert not torch.equal(held(layer).dequantize(), before)


@pytest.mark.parametrize("make", [MAKERS["nf4 double"], MAKERS["int8"]], ids=["nf4 double", "int8"])
def test_a_compiled_layer_follows_the_layout(make: Callable[[], nn.Linear]) -> None:
    torch.compiler.reset()
    layer, x = make(), torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(x)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
        compiled(x).sum().backward()
        prepack(layer)


@makers
@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused_until_the_weight_is_canonical(make: Callable[[], nn.Linear], strict: bool) -> None:
    layer, x = make(), torch.randn(3, 64)
    prepack(layer)
    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match=r"doesn't leave the process; call .unpack\(\)"):
        torch.export.export(layer, (x,), strict=strict)
    layer.weight = held(layer).unpack()
    program = copy.deepcopy(torch.export.export(layer, (x,), strict=strict))
    torch.testing.assert_close(program.module()(x), layer(x))


@makers
def test_distributed_checkpoints_are_canonical(make: Callable[[], nn.Linear], tmp_path: Path) -> None:
    source, target, x = plain_scales(make), plain_scales(make), torch.randn(3, 64)
    expected = source(x)
    for layer in (source, target):
        prepack(layer)
    dcp.save(source.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = target.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    target.load_state_dict(state)
    assert torch.equal(target(x), expected)
    assert held(target).component_layout == LAYOUT


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_directories_are_canonical(make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, format: str) -> None:
    model = make_llama()
    quantize(model, QConfig("int8") if format == "int8" else QConfig("nf4", double_quant=False))
    save_pretrained(model, tmp_path / "before")
    prepack(model)
    save_pretrained(model, tmp_path / "after")
    assert (tmp_path / "after/config.json").read_bytes() == (tmp_path / "before/config.json").read_bytes()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert list(after) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
