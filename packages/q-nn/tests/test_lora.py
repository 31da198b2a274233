"""LoRA, rsLoRA and DoRA over dense and quantized layers, and their training."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import LoRAConfig, LoRALinear, QConfig, add_lora, disable_lora, merge_lora, quantize, set_lora

MakeLlama = Callable[..., LlamaForCausalLM]
Fill = Callable[[nn.Module], None]
formats = pytest.mark.parametrize("format", [None, "nf4", "fp4", "int4", "mxfp4", "nvfp4", "int8", "int8_weight_only"])
kinds = pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}], ids=str)


def double(tensor: Tensor) -> Tensor:
    dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
    return dense.detach().double()


def layer_with(config: LoRAConfig, fill: Fill, format: Any = None, *, bias: bool = True) -> LoRALinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias))
    if format:
        quantize(model, QConfig(format))
    add_lora(model, config)
    fill(model)
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    return layer


# --- what it computes -----------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("format", [None, "nf4", "fp4", "mxfp4", "int8_weight_only"])
@pytest.mark.parametrize("bias", [True, False])
def test_output_equals_the_definition_in_float64(kind: Any, format: Any, bias: bool, fill: Fill) -> None:
    """LoRA: x (W + s B A)ᵀ + b. DoRA: the rows of W + s B A at the lengths that were learned."""
    layer = layer_with(LoRAConfig(rank=4, alpha=6.0, **kind), fill, format, bias=bias)
    adapter = layer.adapters["default"]
    weight = double(layer.weight) + double(adapter.lora_B.weight) @ double(adapter.lora_A.weight) * (
        6 / math.sqrt(4) if kind.get("rslora") else 6 / 4
    )
    if kind.get("dora"):
        weight = weight / weight.norm(dim=1, keepdim=True) * double(adapter.lora_magnitude_vector)[:, None]
    x = torch.randn(5, 64)
    expected = x.double() @ weight.T + (double(layer.bias) if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@kinds
@formats
def test_starts_as_the_base(kind: Any, format: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    if format:
        quantize(model, QConfig(format))
    base, x = model[0], torch.randn(5, 64)
    trainable = add_lora(model, LoRAConfig(rank=4, **kind))
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    torch.testing.assert_close(layer(x), base(x))
    names = ["lora_A.weight", "lora_B.weight"]
    if kind.get("dora"):
        names = ["lora_magnitude_vector", *names]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [f"0.adapters.default.{name}" for name in names]
    assert {p.shape for p in trainable} == {(4, 64), (32, 4), *([(32,)] if kind.get("dora") else [])}
    assert (layer.in_features, layer.out_features) == (64, 32)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dora", [False, True])
def test_dtypes_of_base_and_adapter(dtype: torch.dtype, dora: bool, fill: Fill) -> None:
    for adapter_dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(64, 32).to(dtype))
        add_lora(model, LoRAConfig(rank=4, dora=dora, dtype=adapter_dtype))
        fill(model)
        x = torch.randn(5, 64, dtype=dtype)
        out = model(x)
        out.sum().backward()
        assert out.dtype == dtype
        assert all(p.dtype == adapter_dtype for p in model.parameters() if p.requires_grad)
        reference = copy.deepcopy(model).double()  # a float32 copy would do, but for the base in float64
        error = (out.double() - reference(x.double())).abs().max()
        assert error <= 16 * max(torch.finfo(dtype).eps, torch.finfo(adapter_dtype).eps)


def test_the_update_is_added_before_rounding(fill: Fill) -> None:
    """To a bfloat16 layer's output it is added in float32, and rounded once."""
    model = nn.Sequential(nn.Linear(64, 32).bfloat16())
    base = model[0]
    add_lora(model, LoRAConfig(rank=4))
    fill(model)
    x = torch.randn(50, 64).bfloat16()
    adapter = model[0].adapters["default"]
    update = x.float() @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T * 4
    assert torch.equal(model(x), (base(x) + update).bfloat16())


def test_an_empty_row_stays_finite() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    nn.init.zeros_(model[0].weight[3])
    x = torch.randn(5, 64)
    expected = model(x)
    add_lora(model, LoRAConfig(rank=4, dora=True))
    torch.testing.assert_close(model(x), expected)


def test_dora_decodes_the_weight_and_keeps_nothing(fill: Fill) -> None:
    layer = layer_with(LoRAConfig(rank=4, dora=True), fill, "nf4")
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor)
    layer(torch.randn(5, 64))
    assert weight.cached_bytes == 0
    before = layer(torch.ones(1, 64))
    weight.copy_(weight.dequantize() * 2)  # so that what was learned about lengths isn't that of the old weight
    assert not torch.equal(layer(torch.ones(1, 64)), before)
    other = layer_with(LoRAConfig(rank=4, dora=True), fill, "nf4")
    other(torch.ones(1, 64))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(torch.ones(1, 64)), other(torch.ones(1, 64)))


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_for_training_alone(dora: bool, fill: Fill) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    add_lora(model, LoRAConfig(dropout=0.5, dora=dora))
    fill(model)
    x = torch.randn(3, 64)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    plain = nn.Sequential(model[0].base_layer)
    add_lora(plain, LoRAConfig(dora=dora))
    fill(plain)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


def test_gaussian_start() -> None:
    model = nn.Sequential(nn.Linear(1000, 32))
    add_lora(model, LoRAConfig(rank=50, init="gaussian"))
    assert model[0].adapters["default"].lora_A.weight.std().item() == pytest.approx(1 / 50, rel=0.05)
    assert not model[0].adapters["default"].lora_B.weight.any()


# --- training ---------------------------------------------------------------------------------------------------------------


def definition(model: nn.Module, layers: list[LoRALinear], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Two layers with a ReLU between them, in float64 and from LoRA's and DoRA's papers; the output and the leaves that train."""
    leaves = []
    for index, layer in enumerate(layers):
        adapter = layer.adapters["default"]
        a, b = (double(w.weight).requires_grad_() for w in (adapter.lora_A, adapter.lora_B))
        leaves += [a, b]
        weight = double(layer.weight) + adapter.scaling * b @ a
        if adapter.lora_magnitude_vector is not None:
            m = double(adapter.lora_magnitude_vector).requires_grad_()
            leaves.insert(-2, m)
            weight = m[:, None] * weight / weight.norm(dim=1, keepdim=True).detach()  # a constant for gradients
        x = x @ weight.T + double(layer.bias)
        x = x.relu() if index == 0 else x
    return x, leaves


@kinds
@pytest.mark.parametrize("format", [None, "nf4"])
def test_one_step_equals_an_independent_one_in_float64(kind: Any, format: Any, fill: Fill) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 16))
    if format:
        quantize(model, QConfig(format))
    trainable = add_lora(model, LoRAConfig(rank=4, **kind))
    fill(model)
    x, target = torch.randn(8, 64), torch.randn(8, 16)

    out, leaves = definition(model, [model[0], model[2]], x.double())
    (out - target.double()).pow(2).mean().backward()
    expected = [leaf.detach() - 0.5 * leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(expected) == len(trainable)

    optimizer = torch.optim.SGD(trainable, lr=0.5)
    loss = (model(x) - target).pow(2).mean()
    loss.backward()
    optimizer.step()
    for ours, theirs in zip(trainable, expected, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("format", "reentrant"), [(None, True), ("nf4", True), ("nf4", False), ("int8", True), ("int8", False)])
def test_trains_a_llama_with_checkpointing(
    make_llama: MakeLlama, ids: Tensor, fill: Fill, format: Any, reentrant: bool, dora: bool
) -> None:
    """The gradients are the same whether activations are kept or computed again, and the loss falls."""
    gradients = []
    for checkpointing in (False, True):
        model = make_llama().train()
        if format:
            quantize(model, QConfig(format))
        torch.manual_seed(0)
        trainable = add_lora(model, LoRAConfig(rank=4, dora=dora))
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


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_autocast(format: Any, dora: bool, fill: Fill) -> None:
    """Products are in bfloat16, gradients in the adapters' float32, and DoRA's lengths too."""
    layer = layer_with(LoRAConfig(rank=4, dora=dora), fill, format)
    x = torch.randn(5, 64, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        if dora:
            adapter = layer.adapters["default"]
            with torch.autocast("cpu", enabled=False):
                exact = adapter.row_lengths(layer.weight)
            assert torch.equal(adapter.row_lengths(layer.weight), exact)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    out.float().pow(2).sum().backward()
    for parameter in layer.adapters.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and bool(parameter.grad.any())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_compiled_training_step_in_one_graph(dora: bool, format: Any, fill: Fill) -> None:
    torch.compiler.reset()  # what was compiled for other formats counts against its limit
    layer = layer_with(LoRAConfig(rank=4, dora=dora), fill, format)
    x = torch.randn(5, 64)
    layer(x).pow(2).sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.adapters.parameters() if parameter.grad is not None]
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).pow(2).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in layer.adapters.parameters()], expected)


def test_compiled_code_follows_the_choice_of_adapters(fill: Fill) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(5, 16)
    add_lora(model, LoRAConfig(rank=2, target=("0",), modules_to_save=("2",)), name="a")
    add_lora(model, LoRAConfig(rank=2, target=("0", "2"), exclude=("2",)), name="b")
    fill(model)
    nn.init.normal_(model[2].adapters["a"].weight)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    seen = []
    for names in (("a",), ("b",), ("a", "b"), ("a",)):
        set_lora(model, names)
        seen.append(model(x))
        torch.testing.assert_close(compiled(x), seen[-1])
        with disable_lora(model):
            torch.testing.assert_close(compiled(x), model(x))
    merge_lora(model, reversible=True)
    torch.testing.assert_close(compiled(x), seen[-1])
    assert not any(torch.allclose(one, other) for one, other in itertools.pairwise(seen))


# --- copies -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_state_dict_copy_and_pickle(make_llama: MakeLlama, ids: Tensor, fill: Fill, dora: bool) -> None:
    config = LoRAConfig(dora=dora, modules_to_save=("lm_head",))
    model = make_llama()
    quantize(model, QConfig())
    add_lora(model, config)
    fill(model)
    nn.init.normal_(model.lm_head.weight)
    with torch.no_grad():
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, expected)
            nn.init.zeros_(other.lm_head.weight)
            assert torch.equal(model(ids).logits, expected)
        other = make_llama(seed=1)
        quantize(other, QConfig())
        add_lora(other, config)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids).logits, expected)
