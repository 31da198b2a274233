"""LLM.int8(): outlier columns against float64, weights that stay dense and train, and what outliers do to models without it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from q_core import ops
from q_core.formats.codebooks import INT8_BOUND
from q_core.formats.quantized_tensor import QuantizedTensor
from q_core.layouts import CANONICAL
from q_core.specs.bounds import FACTOR
from q_core.testing.private_layout import LAYOUT, private_layout
from q_nn import Linear8bitLt, LinearNF4, LoRAConfig, QConfig, add_lora, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dense_too = pytest.mark.parametrize("has_fp16_weights", [False, True], ids=["frozen", "trained"])


def decoded(layer: Linear8bitLt) -> Tensor:
    """The weight in float64, as its codes and scales have it."""
    if layer.has_fp16_weights:
        codes, absmax, _ = ops.quantize_int8_rowwise(layer.weight.detach())
    else:
        assert isinstance(layer.weight, QuantizedTensor)
        codes, absmax = layer.weight.components.values()
    return codes.double() * (absmax.double() / 127)[:, None]


def llm_int8(layer: Linear8bitLt, x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's formula in float64, rows quantized in float32 as the format says, and the sum of what is added, in magnitude."""
    x = x_TK.detach().float()
    weight = decoded(layer)
    large = (x.abs() >= layer.threshold) if layer.threshold else torch.zeros_like(x, dtype=torch.bool)
    columns = large.any(0)
    absmax = torch.where(large, 0, x.abs()).amax(1, keepdim=True)
    codes = torch.where(columns | (absmax == 0), 0, (x * (torch.full_like(absmax, 127) / absmax)).round())
    rounded = codes.double() * absmax.double() / 127
    outliers = torch.where(columns, x, 0).double()
    exact = layer.weight.detach().double() if layer.has_fp16_weights else weight
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    expected = rounded @ weight.T + outliers @ exact.T + bias
    # Where columns aren't gathered, an outlier has 16 bits of its row's largest: half a step of the lower digit.
    digits = (outliers.abs().amax(1, keepdim=True) / (127 * 254 * 2)) * columns @ exact.abs().T
    magnitude = rounded.abs() @ weight.abs().T + outliers.abs() @ exact.abs().T + abs(bias)
    dtype = x_TK.dtype
    return expected, magnitude * FACTOR[dtype] * torch.finfo(dtype).eps + digits + torch.finfo(dtype).smallest_normal


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 20),
    K=st.integers(1, 90),
    T=st.integers(1, 9),
    columns=st.integers(0, 90),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    has_fp16_weights=st.booleans(),
    private=st.integers(0, 7).map(lambda chance: not chance),
    seed=st.integers(0, 2**16),
)
def test_outlier_columns_are_multiplied_apart(
    N: int, K: int, T: int, columns: int, dtype: torch.dtype, bias: bool, has_fp16_weights: bool, private: bool, seed: int
) -> None:
    """From no outlier to nothing else, gathered or as two digits, in the canonical layout and in another."""
    torch.manual_seed(seed)
    layer = Linear8bitLt(K, N, bias, dtype=dtype, threshold=6.0, has_fp16_weights=has_fp16_weights)
    x = torch.randn(T, K)
    chosen = torch.randperm(K)[:columns]
    x[torch.randint(T, chosen.shape), chosen] = 60 * torch.randn(chosen.shape)
    x = x.to(dtype)
    expected, tolerance = llm_int8(layer, x)
    with private_layout() if private else nullcontext():
        if private and not has_fp16_weights:
            assert isinstance(layer.weight, QuantizedTensor)
            layer.weight = layer.weight.prepack(LAYOUT)
        out = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), out)
    assert out.dtype == dtype
    assert bool(((out.double() - expected).abs() <= tolerance).all())


@dense_too
@pytest.mark.parametrize("leading", [(), (0,), (1,), (3,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_axes(has_fp16_weights: bool, leading: tuple[int, ...]) -> None:
    layer = Linear8bitLt(50, 7, threshold=1.0, has_fp16_weights=has_fp16_weights)
    x = torch.randn(*leading, 50, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, layer(x.reshape(-1, 50)).view(*leading, 7))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert Linear8bitLt(50, 0, threshold=1.0, has_fp16_weights=has_fp16_weights)(x).shape == (*leading, 0)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@dense_too
def test_gradients_against_float64(has_fp16_weights: bool, dtype: torch.dtype, threshold: float) -> None:
    """Rounding counts as the identity: those of a dense product with the weight that there is."""
    layer = Linear8bitLt(100, 24, dtype=dtype, threshold=threshold, has_fp16_weights=has_fp16_weights)
    assert layer.weight.requires_grad == has_fp16_weights
    x, dy = torch.randn(2, 5, 100, dtype=dtype, requires_grad=True), torch.randn(2, 5, 24, dtype=dtype)
    weight = layer.weight.detach().double() if has_fp16_weights else decoded(layer)
    wanted = {"x": x, "bias": layer.bias} | ({"weight": layer.weight} if has_fp16_weights else {})
    got = dict(zip(wanted, torch.autograd.grad(layer(x), [*wanted.values()], dy), strict=True))
    d, X = dy.double().view(-1, 24), x.detach().double().view(-1, 100)
    terms = {"x": (d, weight), "bias": (d.T, X.new_ones(10, 1)), "weight": (d.T, X)}
    for name, gradient in got.items():
        a, b = terms[name]
        assert gradient.dtype == dtype
        miss = (gradient.double().view(a.shape[0], -1) - a @ b).abs()
        # The weight is decoded to the gradient's dtype before it is multiplied: one rounding more.
        assert bool((miss <= 2 * FACTOR[dtype] * torch.finfo(dtype).eps * (a.abs() @ b.abs())).all()), name


@dense_too
def test_autocast_and_mixed_dtypes(has_fp16_weights: bool) -> None:
    layer = Linear8bitLt(64, 32, threshold=2.0, has_fp16_weights=has_fp16_weights)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(out, layer(x.bfloat16()))
    out.float().square().sum().backward()
    for tensor in (x, layer.weight, layer.bias):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        assert tensor.grad is None or tensor.grad.dtype == torch.float32


@dense_too
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(has_fp16_weights: bool, reentrant: bool) -> None:
    model = nn.Sequential(*(Linear8bitLt(32, 32, threshold=2.0, has_fp16_weights=has_fp16_weights) for _ in range(2)))
    x = torch.randn(4, 32, requires_grad=True)
    wanted = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for tensor, gradient in zip(wanted, expected, strict=True):
        assert torch.equal(tensor.grad, gradient)  # type: ignore[arg-type]


@dense_too
def test_compiles_whole_and_exports(has_fp16_weights: bool) -> None:
    torch.compiler.reset()
    layer = Linear8bitLt(128, 64, threshold=2.5, has_fp16_weights=has_fp16_weights)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = [torch.randn(T, 128, requires_grad=True) for T in (6, 2, 1)]
    for x in inputs:
        out, expected = compiled(x), layer(x)
        assert torch.equal(out, expected)
        wanted = [x, layer.bias] + ([layer.weight] if has_fp16_weights else [])
        torch.testing.assert_close(torch.autograd.grad(out.sum(), wanted), torch.autograd.grad(expected.sum(), wanted))
    layer.threshold = 0.0
    for x in inputs:
        assert torch.equal(compiled(x), layer(x))
    layer.threshold = 2.5
    tokens = torch.export.Dim("tokens", max=64)
    for strict in (False, True):
        program = torch.export.export(layer, (inputs[0],), dynamic_shapes=({0: tokens},), strict=strict).module()
        for x in inputs:
            assert torch.equal(program(x), layer(x))
    codes, absmax = operator_arguments(layer)
    for product in (
        torch.ops.q_nn.mixed_product(x, codes, absmax, None, None, 2.5, CANONICAL),
        torch.ops.q_nn.int8_product(x, codes, absmax, None, CANONICAL),
    ):
        with pytest.raises(RuntimeError, match="no gradient of its own: train the layer"):
            product.sum().backward()


def operator_arguments(layer: Linear8bitLt) -> tuple[Tensor, Tensor]:
    codes, absmax, _ = ops.quantize_int8_rowwise(layer.weight.dequantize() if not layer.has_fp16_weights else layer.weight.detach())
    return codes, absmax


@pytest.mark.parametrize("T", [1, 5])
def test_the_operators_are_good_citizens(T: int) -> None:
    x, (codes, absmax) = torch.randn(T, 32), operator_arguments(Linear8bitLt(32, 8))
    torch.library.opcheck(torch.ops.q_nn.mixed_product.default, (x, codes, absmax, None, None, 2.5, CANONICAL))
    torch.library.opcheck(torch.ops.q_nn.int8_product.default, (x, codes, absmax, None, CANONICAL))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("T", [1, 3])
def test_what_is_not_finite_stays_in_its_row(bad: float, T: int) -> None:
    layer, x = Linear8bitLt(32, 8, threshold=6.0), torch.randn(T, 32)
    x[:, 3] = 60.0
    expected = layer(x)
    x[0, 7] = bad
    out = layer(x)
    assert not torch.isfinite(out[0]).any()
    assert bool(torch.isfinite(out[1:]).all())
    torch.testing.assert_close(out[1:], expected[1:], rtol=0.1, atol=0.1)  # column 7 may be an outlier's now, and no longer rounded


# --- has_fp16_weights -----------------------------------------------------------------------------------------------------


def test_training_follows_the_dense_layer() -> None:
    """Each step meets the weight that the last one left, gradients set to zero or to None, in eval mode or not."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 16)
    layer = Linear8bitLt.from_linear(copy.deepcopy(dense), threshold=6.0, has_fp16_weights=True).eval()
    x, target = torch.randn(128, 64), torch.randn(128, 64) @ torch.randn(64, 16) / 8
    losses: list[list[float]] = []
    for module in (dense, layer):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        losses.append([])
        for _ in range(20):
            loss = F.mse_loss(module(x), target)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    expected, got = losses
    assert got[-1] < 0.8 * got[0]
    assert got == pytest.approx(expected, rel=2 * INT8_BOUND)


def test_a_trained_layer_is_a_plain_one_to_everybody_else() -> None:
    dense = nn.Linear(32, 8, dtype=torch.bfloat16).eval()
    layer = Linear8bitLt.from_linear(dense, threshold=6.0, has_fp16_weights=True)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert not layer.training
    assert "has_fp16_weights=True, threshold=6.0" in repr(layer)
    assert layer.state_dict().keys() == dense.state_dict().keys()
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert (other.threshold, other.has_fp16_weights) == (6.0, True)
    fresh = nn.Linear(32, 8, dtype=torch.bfloat16)
    layer.load_state_dict(fresh.state_dict())
    assert torch.equal(layer.weight, fresh.weight)
    assert layer.weight.requires_grad
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    with pytest.raises(RuntimeError, match="held as Int8Rows"):
        layer.load_state_dict(Linear8bitLt(32, 8).state_dict())
    frozen = Linear8bitLt.from_linear(layer, threshold=6.0)
    assert not frozen.has_fp16_weights
    frozen.load_state_dict(fresh.state_dict())  # quantized as it loads
    assert isinstance(frozen.weight, QuantizedTensor)
    report = quantize(nn.Sequential(layer, nn.Linear(8, 8)), QConfig("nf4"))
    assert any("subclass" in kept.reason and kept.name == "0.weight" for kept in report.kept)


def test_adapters_beside_a_dense_weight() -> None:
    model = nn.Sequential(Linear8bitLt(32, 8, has_fp16_weights=True))
    add_lora(model, LoRAConfig(rank=2))
    model(torch.randn(3, 32)).sum().backward()
    assert model[0].base_layer.weight.grad is None  # type: ignore[union-attr]


@pytest.mark.parametrize("threshold", [-1, float("nan"), float("inf"), "6", True, None])
def test_thresholds_are_checked(threshold: Any) -> None:
    dense = nn.Linear(8, 8)
    for make in (lambda: Linear8bitLt(8, 8, threshold=threshold), lambda: Linear8bitLt.from_linear(dense, threshold=threshold)):
        with pytest.raises(ValueError, match="Linear8bitLt: threshold is"):
            make()
    layer = Linear8bitLt(8, 8, threshold=6)
    with pytest.raises(ValueError, match="threshold is"):
        layer.threshold = threshold
    assert layer.threshold == 6.0
    assert "threshold=6.0" in repr(layer)


def test_other_layers_checkpoints_are_refused() -> None:
    with pytest.raises(RuntimeError, match="which Linear8bitLt doesn't take"):
        Linear8bitLt(64, 64, has_fp16_weights=True).load_state_dict(LinearNF4(64, 64).state_dict())


# --- what it is for -------------------------------------------------------------------------------------------------------


def miss(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("columns", [1, 3, 6])
@pytest.mark.parametrize("T", [1, 32])
def test_planted_outliers_in_a_layer(columns: int, T: int) -> None:
    """Columns × 60 take most of the resolution of all others; apart from them a tenth of the error is left, weights' rounding included."""
    torch.manual_seed(columns)
    dense, x = nn.Linear(4096, 64), torch.randn(T, 4096)
    x[:, torch.randperm(4096)[:columns]] *= 60
    expected = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    layer = Linear8bitLt.from_linear(dense)
    plain = miss(layer(x), expected)
    layer.threshold = 6.0
    assert miss(layer(x), expected) <= plain / 10
    trained = Linear8bitLt.from_linear(dense, threshold=6.0, has_fp16_weights=True)
    assert miss(trained(x), expected) <= plain / 10


def llama() -> tuple[PreTrainedModel, list[tuple[nn.Module, list[nn.Module]]]]:
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    pairs = []
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        pairs += [
            (layer.input_layernorm, [a.q_proj, a.k_proj, a.v_proj]),
            (layer.post_attention_layernorm, [m.gate_proj, m.up_proj]),
        ]
    return model, pairs


def gpt_neox() -> tuple[PreTrainedModel, list[tuple[nn.Module, list[nn.Module]]]]:
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    pairs = []
    for layer in model.gpt_neox.layers:
        pairs.append((layer.input_layernorm, [layer.attention.query_key_value]))
        pairs.append((layer.post_attention_layernorm, [layer.mlp.dense_h_to_4h]))
    return model, pairs


def opt() -> tuple[PreTrainedModel, list[tuple[nn.Module, list[nn.Module]]]]:
    sizes = {"vocab_size": 96, "hidden_size": 128, "ffn_dim": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(word_embed_proj_dim=128, max_position_embeddings=64, **sizes))
    pairs = []
    for layer in model.model.decoder.layers:
        a = layer.self_attn
        pairs += [(layer.self_attn_layer_norm, [a.q_proj, a.k_proj, a.v_proj]), (layer.final_layer_norm, [layer.fc1])]
    return model, pairs


@pytest.mark.parametrize("build", [llama, gpt_neox, opt], ids=lambda build: build.__name__)
@torch.no_grad()
def test_planted_outliers_in_a_model(build: Callable[[], tuple[PreTrainedModel, list[tuple[nn.Module, list[nn.Module]]]]]) -> None:
    """Norms' gains × 60 in a few columns, the next weights' columns / 60: the same model, and the outliers that real ones grow.

    What is measured is the activations' rounding: against the same int8 weights, decoded, in float64.
    """
    torch.manual_seed(0)
    model, pairs = build()
    model.eval()
    for norm, linears in pairs:
        columns = torch.randperm(128)[:3]
        for parameter in norm.parameters():
            parameter[columns] *= 60
        for linear in linears:
            linear.weight[:, columns] /= 60
    quantized, ids = copy.deepcopy(model), torch.randint(96, (2, 24))
    quantize(quantized, QConfig("int8", threshold=0.0))
    layers = {name: layer for name, layer in quantized.named_modules() if isinstance(layer, Linear8bitLt)}
    exact = model.double()
    for name, layer in layers.items():
        exact.get_submodule(name).weight.copy_(decoded(layer))
    expected = exact(ids).logits
    plain = miss(quantized(ids).logits, expected)
    for layer in layers.values():
        layer.threshold = 6.0
    assert miss(quantized(ids).logits, expected) <= plain / 10
