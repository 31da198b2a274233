"""Checkpoints to and from the real wheel, layer by layer and through transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional as B
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from q_core import ops
from q_core.formats.codebooks import INT8_BOUND
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.specs.bounds import FACTOR
from q_nn import Linear4bit, Linear8bitLt, LinearNF4, QConfig, load_into, prepare, quantize, save_pretrained
from q_nn.layers import replace_module

MakeLlama = Callable[..., LlamaForCausalLM]
N, K = 64, 256
kinds = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
nested = pytest.mark.parametrize("double_quant", [False, True])
DTYPES = [torch.float32, torch.bfloat16]


def theirs(quant_type: str, double_quant: bool, storage: torch.dtype = torch.uint8, dtype: torch.dtype = torch.bfloat16) -> Any:
    layer = bnb.nn.Linear4bit(K, N, compress_statistics=double_quant, quant_type=quant_type, quant_storage=storage)
    return layer.to(dtype).to("cpu")


def decoded(layer: Any) -> Tensor:
    """What their layer holds, through their decoder."""
    out: Tensor = B.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return out


@kinds
@nested
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_their_4_bit_layers_load(quant_type: Any, double_quant: bool, storage: torch.dtype) -> None:
    layer = theirs(quant_type, double_quant, storage)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for target in (Linear4bit(K, N, dtype=torch.bfloat16), prepare(nn.Linear(K, N, dtype=torch.bfloat16))):
        target.load_state_dict(state)
        assert isinstance(target.weight, QuantizedTensor)
        assert torch.equal(target.weight.dequantize(), decoded(layer))


@kinds
@nested
def test_our_4_bit_layers_load_there(quant_type: Any, double_quant: bool) -> None:
    layer = Linear4bit(K, N, dtype=torch.bfloat16, quant_type=quant_type, double_quant=double_quant)
    state = layer.state_dict()
    stats = {key.removeprefix("weight."): tensor for key, tensor in state.items() if key.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert isinstance(layer.weight, QuantizedTensor)
    assert torch.equal(B.dequantize_4bit(weight.data, weight.quant_state), layer.weight.dequantize())
    expected = {f"weight.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
    assert {key: (t.dtype, t.shape) for key, t in state.items() if key.startswith("weight.")} == {
        key: (t.dtype, t.shape) for key, t in expected.items()
    }
    key = f"weight.quant_state.bitsandbytes__{quant_type}"
    assert bytes(state[key].tolist()) == bytes(expected[key].tolist())


@pytest.mark.parametrize("shape", [(48, 100), (31, 64), (5, 33)])
def test_shapes_that_they_get_wrong(shape: tuple[int, int]) -> None:
    """K no multiple of the blocksize, N none of 32: the product is that of the decoded weight all the same."""
    layer = LinearNF4(shape[1], shape[0]).eval()
    assert isinstance(layer.weight, QuantizedTensor)
    x = torch.randn(3, shape[1])
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight.dequantize(), layer.bias))


def test_8_bit_layers_both_ways() -> None:
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")
    state = layer.state_dict()
    assert {"weight", "SCB", "weight_format"} < set(state)
    ours = Linear8bitLt(K, N)
    ours.load_state_dict(state)
    flat = ours.state_dict()
    assert flat.keys() == state.keys()
    for key in ("weight", "SCB", "weight_format"):
        assert flat[key].dtype == state[key].dtype
        assert torch.equal(flat[key], state[key])


def planted(T: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations with a few outlier columns, all of them float16 numbers: what the wheel quantizes them as."""
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(T))
    x[:, [3, 77, 200]] *= 60
    return x.half().to(dtype)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_activations_are_quantized_as_there(T: int, threshold: float) -> None:
    x = planted(T, torch.float16)
    codes, absmax, columns = B.int8_vectorwise_quant(x.clone(), threshold)
    ours = ops.quantize_int8_rowwise(x, threshold=threshold)
    assert torch.equal(ours[1], absmax)
    # They multiply with 127 × (1 / absmax), two roundings, which parts us where a number lies within them of the middle of two codes.
    scaled = x.double() * 127 / absmax.double()[:, None]
    in_the_middle = ((scaled - scaled.floor()) - 0.5).abs() <= 127 * 4 * torch.finfo(torch.float32).eps
    assert bool(((ours[0] == codes) | (in_the_middle & ((ours[0] - codes).abs() == 1))).all())
    assert ours[2].nonzero().view(-1).tolist() == ([] if columns is None else columns.tolist())


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_llm_int8_gives_what_it_gives_there(dtype: torch.dtype, T: int, threshold: float) -> None:
    """The same sums but for codes in the middle of two; their scale of the products is 6.200124e-5, rounded, for 1 / 127²."""
    theirs = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
    ours = Linear8bitLt(K, N, threshold=threshold)
    ours.load_state_dict(theirs.state_dict())
    x = planted(T, dtype)
    expected = theirs(x.clone()).float()
    codes, absmax, _ = B.int8_vectorwise_quant(x.half(), threshold)
    other_codes = (ops.quantize_int8_rowwise(x, threshold=threshold)[0] - codes).abs() * absmax[:, None] / 127
    assert isinstance(ours.weight, QuantizedTensor)
    allowed = other_codes @ ours.weight.dequantize().abs().T + limit(expected, dtype, roundings=4) + 1e-4 * expected.abs().max()
    assert bool(((ours(x).float() - expected).abs() <= allowed).all())


def test_weights_that_stay_dense_both_ways() -> None:
    theirs = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=True, threshold=6.0)
    ours = Linear8bitLt(K, N, threshold=6.0, has_fp16_weights=True)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    back = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=True, threshold=6.0)
    back.load_state_dict(ours.state_dict())
    # On a CPU they multiply with the decoded weight and don't round activations while training; in eval mode they fail there.
    x, dy = planted(9).requires_grad_(), torch.randn(9, N)
    expected = torch.autograd.grad(back.train()(x), (x, back.weight, back.bias), dy)
    dx, dweight, dbias = torch.autograd.grad(ours(x), (x, ours.weight, ours.bias), dy)
    torch.testing.assert_close(dweight, expected[1])
    torch.testing.assert_close(dbias, expected[2])
    rounding = dy.abs() @ (ours.weight.detach().abs().amax(1, keepdim=True) * INT8_BOUND).expand(N, K)
    assert bool(((dx - expected[0]).abs() <= 1.01 * rounding).all())  # ours goes through the weight that there is


def weight_only(model: nn.Module) -> nn.Module:
    """The same weights in layers that don't round their input."""
    for module in list(model.modules()):
        if isinstance(module, Linear8bitLt):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            replace_module(model, module, plain)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits.float()
    return out


def limit(reference: Tensor, dtype: torch.dtype, roundings: int = 32) -> float:
    """How far two ways to compute the same logits may be apart, after about that many roundings one after the other."""
    return reference.abs().max().item() * roundings * FACTOR[dtype] * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "config", [QConfig("nf4"), QConfig("fp4", double_quant=False), QConfig(skip=("lm_head", "k_proj"))], ids=str
)
def test_transformers_loads_our_directory(
    make_llama: MakeLlama, ids: Tensor, tmp_path: Path, dtype: torch.dtype, config: QConfig
) -> None:
    model = make_llama(dtype=dtype)
    report = quantize(model, config)
    save_pretrained(model, tmp_path)
    # In training mode: their eval forward on a CPU repacks the weights and rounds everything to bfloat16.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).train()
    names = {name for name, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert names == {layer.name for layer in report.quantized}
    expected = logits(model, ids)
    assert (logits(loaded, ids) - expected).abs().max().item() <= limit(expected, dtype)
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, QuantizedTensor)
        assert torch.equal(decoded(loaded.get_submodule(name)), weight.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformers_loads_our_8_bit_directory(make_llama: MakeLlama, ids: Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_llama(dtype=dtype)
    report = quantize(model, QConfig("int8"))
    save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).train()
    names = {name for name, module in loaded.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    assert names == {layer.name for layer in report.quantized}
    for name in names:
        weight, other = model.get_submodule(name).weight, loaded.get_submodule(name).weight
        assert isinstance(weight, QuantizedTensor)
        assert torch.equal(other.data, weight.components["codes"])
        assert torch.equal(other.SCB, weight.components["absmax"])
    # They decode the weights in training mode; so do we with activations that aren't rounded.
    rounded = logits(model, ids)
    expected = logits(weight_only(model), ids)
    assert (logits(loaded, ids) - expected).abs().max().item() <= limit(expected, dtype)
    # Rounding rows of activations moves logits by a few of int8's steps, one after the other.
    assert (rounded - expected).abs().max().item() <= expected.abs().max().item() * INT8_BOUND * 32


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
        {"load_in_8bit": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_directories_that_transformers_made_load(
    make_llama: MakeLlama, ids: Tensor, tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    make_llama(tied=tied).save_pretrained(tmp_path / "dense")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=BitsAndBytesConfig(**settings)
    ).train()
    quantized.save_pretrained(tmp_path / "quantized")
    model = make_llama(tied=tied, seed=1)
    load_into(model, tmp_path / "quantized")
    expected = logits(quantized, ids)
    assert (logits(weight_only(model), ids) - expected).abs().max().item() <= limit(expected, torch.float32)


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_thresholds_pass_through_directories(make_llama: MakeLlama, ids: Tensor, tmp_path: Path, threshold: float) -> None:
    model = make_llama()
    quantize(model, QConfig("int8"))
    layers = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    for layer in layers:
        layer.threshold = threshold
    save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert {m.state.threshold for m in loaded.modules() if isinstance(m, bnb.nn.Linear8bitLt)} == {threshold}
    reloaded = make_llama(seed=1)
    load_into(reloaded, tmp_path)
    assert [m.threshold for m in reloaded.modules() if isinstance(m, Linear8bitLt)] == [threshold] * len(layers)
    expected = logits(model, ids)
    assert torch.equal(logits(reloaded, ids), expected)
    # They round activations to float16 before int8, which moves some to the next code.
    assert (logits(loaded, ids) - expected).abs().max().item() <= expected.abs().max().item() * INT8_BOUND * 32
    layers[0].threshold = threshold + 1  # which their dialect has no word for
    save_pretrained(model, tmp_path)
    load_into(reloaded := make_llama(seed=2), tmp_path)
    thresholds = [m.threshold for m in reloaded.modules() if isinstance(m, Linear8bitLt)]
    assert thresholds == [threshold + 1] + [threshold] * (len(layers) - 1)


def test_directories_with_dense_weights_to_train_load(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True, llm_int8_threshold=4.0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, quantization_config=config).train()
    theirs.save_pretrained(tmp_path / "theirs")
    model = make_llama(seed=1)
    load_into(model, tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours")
    reloaded = make_llama(seed=2)
    load_into(reloaded, tmp_path / "ours")
    for each in (model, reloaded):
        layers = [m for m in each.modules() if isinstance(m, Linear8bitLt)]
        assert len(layers) == 14
        assert all(layer.has_fp16_weights and layer.threshold == 4.0 and layer.weight.requires_grad for layer in layers)
        expected = logits(theirs, ids)  # theirs don't round activations on a CPU
        assert (logits(each, ids) - expected).abs().max().item() <= expected.abs().max().item() * INT8_BOUND * 32
