"""QuantizedExperts against the modules of transformers that it takes the place of, in float64 with the decoded weights."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from q_core.formats.weight_format import WeightFormat
from q_nn import FourBit, Fp8Rows, Int8Rows, QuantizedExperts, QuantizedTensor
from q_nn.experts import WEIGHTS, why_not

E, N, K, T, TOP = 4, 32, 48, 9, 2
FORMATS: list[WeightFormat] = [
    FourBit("nf4", 64),
    FourBit("nf4", 64, 256),
    FourBit("fp4", 32),
    FourBit("int4", 64),
    FourBit("mxfp4", 32),
    FourBit("nvfp4", 16),
    Int8Rows(),
    Fp8Rows(),
]
formats = pytest.mark.parametrize("format", FORMATS, ids=str)


class Config(SimpleNamespace):
    """What the experts of most families read of their config."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        sizes = {"hidden_size": K, "intermediate_size": N, "moe_intermediate_size": N, "hidden_act": "silu"}
        if name in sizes:
            return sizes[name]
        if name in ("num_experts", "num_local_experts", "n_routed_experts"):
            return E
        raise AttributeError(name)


def dense_experts(cls: type[nn.Module] = MixtralExperts, seed: int = 0, **settings: Any) -> nn.Module:
    experts = cls(Config(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return experts


def routed(seed: int = 1, dtype: torch.dtype = torch.float32, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, K, generator=generator).to(dtype)
    ids = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :TOP]
    return x, ids, torch.rand(tokens, TOP, generator=generator).to(dtype)


def decoded(dense: nn.Module, quantized: QuantizedExperts) -> nn.Module:
    """The family's own module in float64, with the weights that the quantized ones stand for."""
    reference = copy.deepcopy(dense).double()
    with torch.no_grad():
        for name in WEIGHTS:
            weight = getattr(quantized, name)
            getattr(reference, name).copy_(weight.dequantize())
    return reference


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float(((got.double() - expected).norm() / expected.norm()).detach())


def in_transformers(family: str, name: str) -> type[nn.Module]:
    cls: type[nn.Module] = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    return cls


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "MixtralExperts"),
        ("qwen2_moe", "Qwen2MoeExperts"),
        ("qwen3_moe", "Qwen3MoeExperts"),
        ("olmoe", "OlmoeExperts"),
        ("deepseek_v2", "DeepseekV2Experts"),
        ("deepseek_v3", "DeepseekV3Experts"),
        ("glm4_moe", "Glm4MoeExperts"),
        ("lfm2_moe", "Lfm2MoeExperts"),
    ],
)
def test_families_that_are_taken(family: str, name: str) -> None:
    dense = dense_experts(in_transformers(family, name))
    quantized = QuantizedExperts.from_experts(dense, FourBit())
    x, ids, weights = routed()
    expected = decoded(dense, quantized)(x.double(), ids, weights.double())
    assert relative_error(quantized(x, ids, weights), expected) < 1e-6
    assert dict(quantized.named_parameters()).keys() == dict(dense.named_parameters()).keys()


@pytest.mark.parametrize(
    ("family", "name", "settings", "reason"),
    [
        (
            "gpt_oss",
            "GptOssExperts",
            {"swiglu_limit": 7.0, "swiglu_alpha": 1.7},
            "have biases, hold their weights transposed, interleave gate and up",
        ),
        ("aria", "AriaExperts", {"moe_num_experts": E}, "hold their weights transposed"),
        ("llama4", "Llama4TextExperts", {}, "what it computes isn't known"),
        ("deepseek_v4", "DeepseekV4Experts", {"swiglu_limit": 10.0}, r"its activation isn't silu\(gate\) \* up"),
        ("mixtral", "MixtralExperts", {"hidden_act": "gelu"}, r"its activation isn't silu\(gate\) \* up"),
    ],
)
def test_families_that_compute_something_else(family: str, name: str, settings: dict[str, Any], reason: str) -> None:
    experts = dense_experts(in_transformers(family, name), **settings)
    with pytest.raises(ValueError, match=f"{name} can't be taken: .*{reason}"):
        QuantizedExperts.from_experts(experts, FourBit())


def test_more_tensors_and_other_shapes_are_refused() -> None:
    experts = dense_experts()
    experts.register_buffer("scale", torch.ones(1))
    assert why_not(experts) == "its tensors are down_proj, gate_up_proj, scale, expected gate_up_proj and down_proj"
    experts = dense_experts()
    experts.down_proj = nn.Parameter(torch.ones(E, K, N + 1))
    assert "expected [E, 2N, K] and [E, K, N]" in str(why_not(experts))
    assert why_not(QuantizedExperts.from_experts(dense_experts(), FourBit())) == "quantized already"


@formats
@pytest.mark.parametrize(("n", "k"), [(N, K), (7, 30)], ids=["whole blocks", "partial blocks"])
def test_output_and_gradients(format: WeightFormat, n: int, k: int) -> None:
    dense = dense_experts(intermediate_size=n, hidden_size=k)
    quantized = QuantizedExperts.from_experts(dense, format)
    x, ids, weights = routed()
    x = x[:, :k].clone()
    ids[2, 0], ids[3, 1] = E, -1  # experts that are elsewhere
    pairs = []
    for module, dtype in ((quantized, torch.float32), (decoded(dense, quantized), torch.float64)):
        own_x, own_weights = (tensor.clone().to(dtype).requires_grad_() for tensor in (x, weights))
        known = torch.where(ids < 0, E, ids) if dtype == torch.float64 else ids
        output = module(own_x, known, own_weights)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output))
        pairs.append((output.detach(), own_x.grad, own_weights.grad))
    for got, expected in zip(*pairs, strict=True):
        assert got is not None and expected is not None
        assert relative_error(got, expected) < 1e-6


@formats
def test_error_against_the_dense_module(format: WeightFormat) -> None:
    """Rounding each weight within the format's bound: relative error of the output, as measured on random weights, and a margin."""
    dense = dense_experts()
    x, ids, weights = routed()
    with torch.no_grad():
        expected = dense.double()(x.double(), ids, weights.double())
        got = QuantizedExperts.from_experts(dense.float(), format)(x, ids, weights)
    limits = {Int8Rows(): 0.02, Fp8Rows(): 0.08}
    assert relative_error(got, expected) < limits.get(format, 0.3)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    dense = dense_experts()
    quantized = QuantizedExperts.from_experts(dense, FourBit())
    x, ids, weights = routed(dtype=dtype)
    expected = decoded(dense, quantized)(x.double(), ids, weights.double())
    got = quantized(x, ids, weights)
    assert got.dtype == dtype
    assert relative_error(got, expected) < 4 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        mixed = quantized(x.float(), ids, weights)
    assert mixed.dtype == torch.float32
    assert relative_error(mixed, expected) < 4 * torch.finfo(dtype).eps


def test_no_tokens() -> None:
    quantized = QuantizedExperts.from_experts(dense_experts(), FourBit())
    assert quantized(*routed(tokens=0)).shape == (0, K)


@formats
def test_state_dict_there_and_back(format: WeightFormat) -> None:
    quantized = QuantizedExperts.from_experts(dense_experts(), format)
    state = quantized.state_dict()
    assert all(type(tensor) is Tensor for tensor in state.values())
    for other_format in (format, Int8Rows(), FourBit("fp4", 128)):
        other = QuantizedExperts.from_experts(dense_experts(seed=1), other_format)
        other.load_state_dict(state)
        assert torch.equal(other(*routed()), quantized(*routed()))
    dense = dense_experts(seed=2)
    other.load_state_dict(dense.state_dict())  # quantized as it is loaded, in the format that is there
    assert torch.equal(other(*routed()), QuantizedExperts.from_experts(dense, format)(*routed()))


def test_weights_held_in_different_ways() -> None:
    dense = dense_experts()
    first, second = (
        QuantizedTensor.quantize(dense.get_parameter(name), format)
        for name, format in zip(WEIGHTS, (FourBit(), Int8Rows()), strict=True)
    )
    quantized = QuantizedExperts(first, second)
    x, ids, weights = routed()
    assert relative_error(quantized(x, ids, weights), decoded(dense, quantized)(x.double(), ids, weights.double())) < 1e-6


def test_copies() -> None:
    quantized = QuantizedExperts.from_experts(dense_experts(), FourBit("nf4", 64, 256))
    expected = quantized(*routed())
    assert torch.equal(copy.deepcopy(quantized)(*routed()), expected)
    assert torch.equal(quantized.to("meta").to_empty(device="cpu").gate_up_proj.dequantize()[:0], torch.empty(0, 2 * N, K))


@pytest.mark.parametrize("format", [FourBit("nf4", 64, 256), Int8Rows()], ids=str)
def test_compiled_as_one_graph(format: WeightFormat) -> None:
    quantized = QuantizedExperts.from_experts(dense_experts(), format)
    x, ids, weights = routed()
    x.requires_grad_()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (compiled, quantized):
        x.grad = None
        output = module(x, ids, weights)
        output.square().sum().backward()
        gradients.append((output.detach(), x.grad))
    for got, expected in zip(*gradients, strict=True):
        assert got is not None and expected is not None
        torch.testing.assert_close(got, expected)


def test_what_it_shows() -> None:
    quantized = QuantizedExperts.from_experts(dense_experts().eval(), Int8Rows())
    assert repr(quantized) == f"QuantizedExperts(num_experts={E}, hidden_dim={K}, intermediate_dim={N}, format=Int8Rows())"
    assert not quantized.training
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_bad_weights_are_refused() -> None:
    dense = dense_experts()
    good = {name: QuantizedTensor.quantize(dense.get_parameter(name), Int8Rows()) for name in WEIGHTS}
    with pytest.raises(TypeError, match="down_proj is Parameter"):
        QuantizedExperts(good["gate_up_proj"], dense.down_proj)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected \[E, 2N, K\] and \[E, K, N\]"):
        QuantizedExperts(good["down_proj"], good["gate_up_proj"])
    with torch.no_grad():
        dense.down_proj[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"1 of .* elements are NaN"):
        QuantizedExperts.from_experts(dense, Int8Rows())
