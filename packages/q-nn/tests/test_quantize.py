"""quantize(): what it does, what it leaves, and what it says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import Linear4bit, Linear8bitLt, LinearFP4, LinearInt8, LinearNF4, QConfig, quantize, weight_bytes

MakeLlama = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize(
    ("format", "layer"),
    [
        ("nf4", LinearNF4),
        ("fp4", LinearFP4),
        ("int4", Linear4bit),
        ("mxfp4", Linear4bit),
        ("nvfp4", Linear4bit),
        ("int8", Linear8bitLt),
        ("int8_weight_only", LinearInt8),
    ],
)
def test_a_llama(make_llama: MakeLlama, ids: Tensor, format: Any, layer: type[nn.Linear]) -> None:
    model = make_llama()
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = weight_bytes(model)
    report = quantize(model, QConfig(format))
    quantized = {name for name, module in model.named_modules() if type(module) is layer}
    assert len(quantized) == 14
    assert {entry.name for entry in report.quantized} == quantized
    assert {entry.name for entry in report.kept} == set(dense) - {f"{name}.weight" for name in quantized}
    assert (report.bytes_before, report.bytes_after) == (before, weight_bytes(model))
    saved = sum(entry.bytes_before - entry.bytes_after for entry in report.quantized)
    assert report.bytes_before - report.bytes_after == saved
    for name in quantized:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, QuantizedTensor)
        assert torch.equal(weight, QuantizedTensor.quantize(dense[f"{name}.weight"], QConfig(format).weight_format()))
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert reasons["lm_head.weight"] == "skipped by 'lm_head'"
    assert reasons["model.embed_tokens.weight"] == "embeddings are quantized where a rule says so"
    assert "14 layers" in str(report)
    assert "lm_head" in str(report)
    assert model(ids).logits.shape == (2, 7, 96)


def test_bits_a_weight() -> None:
    for config, bits in ((QConfig(), 4.127), (QConfig(double_quant=False), 4.5), (QConfig("int8"), 8 + 32 / 1024)):
        model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
        quantize(model, config)
        assert weight_bytes(model) * 8 / 1024**2 == pytest.approx(bits, rel=1e-3)


def test_tied_weights_stay_tied(make_llama: MakeLlama) -> None:
    model = make_llama(tied=True)
    report = quantize(model, QConfig(skip=()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {e.name: e.reason for e in report.kept}["lm_head.weight"] == (
        "tied to model.embed_tokens.weight, which isn't quantized likewise"
    )


class Mixed(nn.Module):
    """Things that look like linear layers and aren't, or that must be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.hooked = nn.Linear(64, 64)
        self.hooked.register_forward_hook(lambda module, inputs, output: output * 2)
        self.attention = nn.MultiheadAttention(64, 2)
        self.experts = nn.Parameter(torch.zeros(4, 64, 64))
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.double = nn.Linear(64, 64, dtype=torch.float64)
        self.done = LinearNF4(64, 64)


def test_nothing_is_left_silently() -> None:
    model = Mixed()
    report = quantize(model, QConfig())
    assert [entry.name for entry in report.quantized] == ["first"]
    assert model.first is model.again
    assert isinstance(model.first, LinearNF4)
    reasons = {entry.name: entry.reason for entry in report.kept}
    assert reasons["hooked.weight"].startswith("it has hooks")
    assert reasons["attention.out_proj.weight"] == "NonDynamicallyQuantizableLinear is a subclass, which may compute something else"
    assert reasons["experts"] == "Mixed is no linear layer, embedding or fused experts"
    assert reasons["double.weight"] == "its dtype is torch.float64"
    assert reasons["done.weight"] == "quantized already"
    assert any("Parametrized" in reason for reason in reasons.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_weights_are_named_before_anything_changes(make_llama: MakeLlama, bad: float) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has 1 elements"):
        quantize(model, QConfig())
    assert not any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters())


def test_models_that_cannot_be_quantized() -> None:
    with pytest.raises(ValueError, match="meta device"):
        quantize(nn.Sequential(nn.Linear(64, 64, device="meta")), QConfig())
    with pytest.raises(ValueError, match="use quantize_module"):
        quantize(nn.Linear(64, 64), QConfig())
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize(nn.Sequential(nn.Conv2d(3, 3, 3)), QConfig())
    with pytest.raises(ValueError, match="'self_attn' means no module"):
        quantize(nn.ModuleDict({"self_attn_": nn.Linear(64, 64)}), QConfig(skip=("self_attn",)))
    with pytest.raises(TypeError, match="expected a QConfig"):
        quantize(nn.Sequential(nn.Linear(64, 64)), "nf4")  # type: ignore[arg-type]


def test_skip_patterns_mean_what_they_mean_in_transformers() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    from q_nn.patterns import matching

    names = ["lm_head", "layers.1.fc1", "layers.11.fc1", "layers.1", "a.gate", "a.gate_proj", "model.lm_head", "fc1", "x.lm_head2"]
    for pattern in (
        "lm_head",
        "layers.1",
        "layers.*",
        "fc1",
        "a.gate",
        "gate",
        r"layers\.\d+\.fc1",
        "layers.1.",
        "head|fc1",
        "^fc1$",
    ):
        for name in names:
            assert (matching(name, (pattern,)) is None) == should_convert_module(name, [pattern]), (name, pattern)
