"""The layers: products, gradients, state dicts, and all that a module goes through."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from q_core import ops
from q_core.formats.checkpoint import to_flat
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import FourBit, Int8Rows, Linear4bit, Linear8bitLt, LinearFP4, LinearNF4, prepare

Make = Callable[..., nn.Linear]
LAYERS: list[Make] = [
    LinearNF4,
    LinearFP4,
    lambda *args, **kwargs: Linear4bit(*args, quant_type="fp4", blocksize=32, double_quant=False, **kwargs),
    Linear8bitLt,
    lambda *args, **kwargs: Linear8bitLt(*args, threshold=2.0, **kwargs),
]
layers = pytest.mark.parametrize("make", LAYERS, ids=["nf4", "fp4", "4bit", "int8", "int8-outliers"])


def dequantized(layer: nn.Linear) -> Tensor:
    assert isinstance(layer.weight, QuantizedTensor)
    return layer.weight.dequantize()


@settings(max_examples=25, deadline=None)
@given(
    make=st.sampled_from([make for make in LAYERS if not getattr(make(1, 1), "threshold", 0)]),  # outliers: test_linear8bit.py
    N=st.integers(1, 40),
    K=st.integers(1, 150),
    leading=st.sampled_from([(), (0,), (1,), (3,), (2, 3)]),
    bias=st.booleans(),
)
def test_any_shape_is_right(make: Make, N: int, K: int, leading: tuple[int, ...], bias: bool) -> None:
    layer = make(K, N, bias)
    x = torch.randn(*leading, K)
    out = layer(x)
    if isinstance(layer, Linear8bitLt):
        q, absmax, _ = ops.quantize_int8_rowwise(x)
        x = q * (absmax / 127).unsqueeze(-1)
    torch.testing.assert_close(out, F.linear(x, dequantized(layer), layer.bias))


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_go_through_the_decoded_weight(make: Make, dtype: torch.dtype) -> None:
    layer = make(100, 24, dtype=dtype)
    assert layer(torch.zeros(2, 100)).dtype == torch.float32  # the activations' dtype counts, not the bias's
    x = torch.randn(5, 100, dtype=dtype, requires_grad=True)
    dy = torch.randn(5, 24, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    dx, dbias = torch.autograd.grad(out, (x, layer.bias), dy)
    weight = dequantized(layer).double()
    # One of the factors and the result may be rounded to dtype, by half an epsilon each; the rest is a float32 sum of 24 products.
    limit = (torch.finfo(dtype).eps + 24 * torch.finfo(torch.float32).eps) * (dy.double().abs() @ weight.abs())
    assert bool(((dx.double() - dy.double() @ weight).abs() <= limit).all())
    torch.testing.assert_close(dbias, dy.sum(0))
    assert not layer.weight.requires_grad


@layers
def test_autocast(make: Make) -> None:
    layer, x = make(64, 32), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, layer(x.bfloat16()))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@layers
def test_checkpoint_at_any_moment_decodes_the_same(make: Make) -> None:
    """Where the peer repacks its weights in an eval forward and saves what it then holds."""
    layer = make(128, 64).eval()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            layer(torch.randn(3, 128))
        after = layer.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert all(type(tensor) is Tensor for tensor in after.values())


@layers
def test_state_dict_loads_strictly_everywhere(make: Make) -> None:
    source, x = make(128, 64, dtype=torch.bfloat16), torch.randn(3, 128, dtype=torch.bfloat16)
    state, expected = source.state_dict(), source(x)

    target = make(128, 64, dtype=torch.bfloat16)
    target.load_state_dict(state)
    assert torch.equal(target(x), expected)

    with torch.device("meta"):
        target = make(128, 64, dtype=torch.bfloat16)
    target.load_state_dict(state, assign=True)
    assert torch.equal(target(x), expected)
    assert not target.weight.requires_grad

    for assign in (False, True):
        plain = prepare(nn.Linear(128, 64, dtype=torch.bfloat16))
        plain.load_state_dict(state, assign=assign)
        assert torch.equal(dequantized(plain), dequantized(source))
        assert not plain.weight.requires_grad

    for copied in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert torch.equal(copied(x), expected)
        assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), state.values(), strict=True))
        copied.load_state_dict(state)


@layers
def test_dense_weights_are_quantized_as_they_load(make: Make) -> None:
    dense, layer = nn.Linear(128, 64), make(128, 64)
    layer.load_state_dict(dense.state_dict())
    assert isinstance(layer.weight, QuantizedTensor)
    assert torch.equal(dequantized(layer), QuantizedTensor.quantize(dense.weight, layer.weight.format).dequantize())
    with torch.device("meta"):
        layer = make(128, 64)
    layer.load_state_dict(dense.state_dict(), assign=True)
    assert isinstance(layer.weight, QuantizedTensor)


def test_a_checkpoint_brings_its_own_blocksize() -> None:
    source = LinearNF4(128, 64, blocksize=128, double_quant=False)
    target = LinearNF4(128, 64)
    target.load_state_dict(source.state_dict())
    assert isinstance(target.weight, QuantizedTensor)
    assert target.weight.format == FourBit("nf4", 128)
    assert torch.equal(dequantized(target), dequantized(source))


@pytest.mark.parametrize("into", ["same format", "other format", "dense"])
@layers
def test_loading_keeps_the_modules_dtype_and_assigning_takes_the_checkpoints(make: Make, into: str) -> None:
    """As torch does with any parameter."""
    source = make(128, 64, dtype=torch.bfloat16)
    if into == "other format" and isinstance(source.weight.format, FourBit):
        source = type(source).from_linear(nn.Linear(128, 64, dtype=torch.bfloat16), blocksize=128)
    state = source.state_dict()
    for assign in (False, True):
        target = prepare(nn.Linear(128, 64)) if into == "dense" else make(128, 64)
        target.load_state_dict(state, assign=assign)
        took = assign and "weight_format" not in state  # of an int8 weight no checkpoint says the dtype
        assert target.weight.dtype == (torch.bfloat16 if took else torch.float32)
        assert target.bias.dtype == (torch.bfloat16 if assign else torch.float32)
        assert torch.equal(dequantized(target).bfloat16(), dequantized(source))


@pytest.mark.parametrize(
    ("make", "wrong"),
    [(LinearNF4, LinearFP4), (LinearNF4, Linear8bitLt), (Linear8bitLt, LinearNF4), (Linear4bit, Linear8bitLt)],
)
def test_another_format_is_refused(make: Make, wrong: Make) -> None:
    layer = make(128, 64)
    before = dequantized(layer)
    with pytest.raises(RuntimeError, match=f"which {make.__name__} doesn't take"):
        layer.load_state_dict(wrong(128, 64).state_dict())
    assert torch.equal(dequantized(layer), before)


def test_bad_checkpoints_are_named_and_leave_the_weight_alone() -> None:
    model = nn.Sequential(LinearNF4(128, 64), LinearNF4(64, 32))
    before = [dequantized(layer) for layer in model]
    state = model.state_dict()
    del state["0.weight.nested_absmax"]
    state["1.weight.absmax"] = state["1.weight.absmax"][1:]
    with pytest.raises(RuntimeError, match=r"(?s)0\.weight\.nested_absmax is missing.*1\.weight\.absmax is") as caught:
        model.load_state_dict(state)
    assert "Missing key" not in str(caught.value)
    assert all(torch.equal(dequantized(layer), dense) for layer, dense in zip(model, before, strict=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        LinearNF4(128, 64).load_state_dict(LinearNF4(64, 64).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        nn.Linear(128, 64).load_state_dict(LinearNF4(128, 64).state_dict())  # without prepare()
    dense = nn.Linear(128, 64).state_dict()
    dense["weight"][0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        LinearNF4(128, 64).load_state_dict(dense)


def test_scales_are_right_after_load_and_move() -> None:
    """The scales that inference keeps are not those of an earlier weight."""
    layer, x = LinearNF4(128, 64), torch.randn(3, 128)
    with torch.no_grad():
        layer(x)
        for _ in range(3):
            other = LinearNF4(128, 64)
            layer.load_state_dict(other.state_dict())
            assert torch.equal(layer(x), other(x))
            layer.to(torch.bfloat16).to(torch.float32)
            assert torch.equal(dequantized(layer), dequantized(other))


@layers
def test_from_linear_and_reset(make: Make) -> None:
    dense = nn.Linear(128, 64).eval()
    for layer in (LinearNF4.from_linear(dense), LinearFP4.from_linear(dense, blocksize=32), Linear8bitLt.from_linear(dense)):
        assert layer.bias is dense.bias
        assert not layer.training
        assert (layer.in_features, layer.out_features) == (128, 64)
    layer = make(128, 64)
    before = dequantized(layer)
    layer.reset_parameters()
    assert not torch.equal(dequantized(layer), before)
    assert isinstance(layer.weight, nn.Parameter)
    assert "format=" in repr(layer)


@pytest.mark.parametrize("make", [LinearNF4, Linear8bitLt])
def test_compiles_whole(make: Make) -> None:
    torch.compiler.reset()
    model = nn.Sequential(make(128, 64), nn.GELU(), make(64, 32))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 2):
        x = torch.randn(T, 128, requires_grad=True)
        out, expected = compiled(x), model(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="quant_type is 'int3'"):
        Linear4bit(8, 8, quant_type="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocksize is 48"):
        LinearNF4(8, 8, blocksize=48)
    with pytest.raises(ValueError, match=r"x_TK has shape \[3, 7\]"):
        LinearNF4(8, 8)(torch.zeros(3, 7))
    assert Linear8bitLt(8, 8, device="meta").weight.is_meta
    assert to_flat("weight", QuantizedTensor.empty((8, 8), Int8Rows(), dtype=torch.float32))["SCB"].shape == (8,)
