"""quantize() by rule: which module gets which format, what is tied, what is reported, and how much memory it takes on the way."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from q_nn import (
    Embedding8bit,
    FourBit,
    Int8Rows,
    Linear8bitLt,
    LinearInt8,
    QConfig,
    QRule,
    QuantizedExperts,
    QuantizedTensor,
    plan_quantization,
    quantize,
    quantize_module,
    weight_bytes,
)

MakeLlama = Callable[..., LlamaForCausalLM]


def formats_of(model: nn.Module) -> dict[str, object]:
    return {name: weight.format for name, weight in model.named_parameters() if isinstance(weight, QuantizedTensor)}


def reasons(report: Any) -> dict[str, str]:
    return {parameter.name: parameter.reason for parameter in report.kept}


def test_each_module_gets_what_its_rule_says(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama()
    report = quantize(
        model,
        QConfig(
            "nf4",
            rules=(
                QRule("lm_head", "int8_weight_only"),
                QRule("model.layers.0.self_attn", None),
                QRule(r".*\.v_proj", "int8", threshold=0.0),
                QRule(".*mlp", "fp4", blocksize=32, double_quant=False, module_type="Linear"),
                QRule(module_type=nn.Embedding, format="int8_weight_only"),
            ),
        ),
    )
    formats = formats_of(model)
    assert formats["lm_head.weight"] == formats["model.embed_tokens.weight"] == Int8Rows()
    assert formats["model.layers.1.self_attn.v_proj.weight"] == Int8Rows()
    assert formats["model.layers.1.self_attn.q_proj.weight"] == FourBit("nf4", 64, 256)
    assert {formats[f"model.layers.{i}.mlp.{name}_proj.weight"] for i in (0, 1) for name in ("gate", "up", "down")} == {
        FourBit("fp4", 32)
    }
    assert reasons(report)["model.layers.0.self_attn.v_proj.weight"] == "left by the rule for 'model.layers.0.self_attn'"
    assert {layer.format for layer in report.quantized} == {
        "nf4, blocks of 64, double-quantized scales",
        "fp4, blocks of 32",
        "int8, weight only",
        "int8, threshold 0",
    }
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (type(head), type(embedding)) == (LinearInt8, Embedding8bit)
    rounding = model.get_submodule("model.layers.1.self_attn.v_proj")
    assert isinstance(rounding, Linear8bitLt)
    assert rounding.threshold == 0
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": (QRule("mlp_", "nf4"),)}, "the rule for 'mlp_' means no module with parameters"),
        ({"rules": (QRule(module_type="Conv1d"),)}, "the rule for Conv1d means no module with parameters"),
        ({"rules": (QRule(".*proj", "fp4"), QRule("q_proj", "nf4"))}, "'q_proj' means nothing that an earlier rule doesn't mean"),
        ({"skip": ("mlp",)}, "skip pattern 'mlp' means no module with parameters"),  # its layers are called otherwise
        ({"skip": (".*",)}, "nothing to quantize: .*skipped by"),
    ],
)
def test_rules_that_mean_nothing_are_refused(make_llama: MakeLlama, settings: dict[str, Any], message: str) -> None:
    model = make_llama()
    with pytest.raises(ValueError, match=message):
        quantize(model, QConfig(**settings))
    assert not formats_of(model)


@pytest.mark.parametrize(
    ("format", "other"), [("int8_weight_only", "int8"), ("nf4", "nf4"), ("nvfp4", "nvfp4")]
)  # LLM.int8() or not, the weight is the same
def test_tied_weights_are_quantized_together_if_rules_mean_all(make_llama: MakeLlama, ids: Tensor, format: Any, other: Any) -> None:
    both = (QRule("lm_head", format), QRule("embed_tokens", other))
    model = make_llama(tied=True)
    dense = model.lm_head.weight.detach().clone()
    before = weight_bytes(model)
    report = quantize(model, QConfig(rules=both))
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    assert torch.equal(weight.dequantize(), QuantizedTensor.quantize(dense, weight.format).dequantize())
    (entry,) = [layer for layer in report.quantized if layer.tied]
    assert (entry.name, entry.tied, entry.bytes_before) == ("model.embed_tokens", ("lm_head",), dense.nbytes)
    assert (report.bytes_before, report.bytes_after) == (before, weight_bytes(model))
    assert "quantized 16 layers" in str(report)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, QuantizedTensor)
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("rules", [(QRule("embed_tokens", "nf4"),), (QRule("embed_tokens", "nf4"), QRule("lm_head", "fp4"))])
def test_tied_weights_are_left_otherwise(make_llama: MakeLlama, rules: tuple[QRule, ...]) -> None:
    model = make_llama(tied=True)
    report = quantize(model, QConfig(rules=rules))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not isinstance(model.lm_head.weight, QuantizedTensor)
    assert reasons(report)["model.embed_tokens.weight"] == "tied to lm_head.weight, which isn't quantized likewise"


def test_linear_layers_that_share_a_weight_or_a_bias() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in "abc"})
    model["b"].weight = model["a"].weight
    model["c"].bias = model["a"].bias
    report = quantize(model, QConfig())
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight is not model["c"].weight
    assert model["a"].bias is model["c"].bias
    assert [(layer.name, layer.tied) for layer in report.quantized] == [("a", ("b",)), ("c", ())]


def test_the_report_is_for_programs_too(make_llama: MakeLlama) -> None:
    report = quantize(make_llama(), QConfig("int8_weight_only"))
    read = json.loads(json.dumps(report.to_dict()))
    assert read["bytes_after"] == report.bytes_after
    assert read["quantized"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "kind": "linear layer",
        "format": "int8, weight only",
        "shapes": [[128, 128]],
        "bytes_before": 4 * 128 * 128,
        "bytes_after": 128 * 128 + 4 * 128,
        "tied": [],
    }
    assert {"name", "shape", "bytes", "reason"} == set(read["kept"][0])


def test_dense_weights_are_let_go_of_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is quantized, of those before it only the quantized weights are there."""
    layers = 6
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    original = QuantizedTensor.quantize.__func__  # type: ignore[attr-defined]

    def counted(cls: type[QuantizedTensor], *arguments: Any) -> QuantizedTensor:
        alive.append(sum(reference() is not None for reference in dense))
        return original(cls, *arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(QuantizedTensor, "quantize", classmethod(counted))
    quantize(model, QConfig())
    assert alive == [layers - done for done in range(layers)]
    assert not any(reference() is not None for reference in dense)


def test_an_interrupted_call_can_be_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    model, whole = make(), make()
    original = QuantizedTensor.quantize.__func__  # type: ignore[attr-defined]
    calls = []

    def interrupted(cls: type[QuantizedTensor], *arguments: Any) -> QuantizedTensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(cls, *arguments)  # type: ignore[no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedTensor, "quantize", classmethod(interrupted))
        with pytest.raises(KeyboardInterrupt):
            quantize(model, QConfig())
    assert len(formats_of(model)) == 2
    quantize(model, QConfig())
    quantize(whole, QConfig())
    x = torch.randn(3, 64)
    assert torch.equal(model(x), whole(x))


def test_a_plan_of_a_model_on_meta_is_that_of_the_real_one(make_llama: MakeLlama) -> None:
    config = QConfig(rules=(QRule("lm_head", "nf4"), QRule("embed_tokens", "nf4")))
    plan = plan_quantization(make_llama(tied=True), config)
    with torch.device("meta"):
        on_meta = LlamaForCausalLM(make_llama(tied=True).config)
    assert plan_quantization(on_meta, config) == plan
    on_meta.lm_head.weight = nn.Parameter(on_meta.lm_head.weight.clone())  # declared to be tied, but not one object
    assert plan_quantization(on_meta, config) == plan
    assert plan.layers[0].names == ("model.embed_tokens", "lm_head")


def test_one_module_by_itself() -> None:
    linear = nn.Linear(64, 32)
    rule = QRule(".*", "nf4")
    quantized = quantize_module("a", linear, rule)
    assert not isinstance(linear.weight, QuantizedTensor)
    assert isinstance(quantized.weight, QuantizedTensor)
    assert quantized.bias is linear.bias
    on_meta = quantize_module("a", nn.Linear(64, 32, device="meta"), rule)
    on_meta.load_state_dict(quantized.state_dict(), assign=True)
    assert torch.equal(on_meta.weight.dequantize(), quantized.weight.dequantize())  # type: ignore[operator]
    with torch.no_grad():
        linear.weight[1, 1] = float("inf")
    with pytest.raises(ValueError, match=r"quantize: a.weight: .* 1 of 2048 elements are NaN or infinite"):
        quantize_module("a", linear, rule)
    with pytest.raises(ValueError, match="a can't be quantized: Conv2d is no linear layer"):
        quantize_module("a", nn.Conv2d(1, 1, 1), rule)
    with pytest.raises(ValueError, match="the rule for a has no format"):
        quantize_module("a", nn.Linear(2, 2), QRule("a"))
    with pytest.raises(ValueError, match="fp8 is for experts only"):
        quantize_module("a", nn.Linear(2, 2), QRule("a", "fp8"))


def test_what_another_module_would_lose() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Embedding(4, 64, max_norm=1.0)})
    model["b"].forward = lambda x: x  # as accelerate's hooks do
    report = quantize(model, QConfig(rules=(QRule("c", "nf4"),)))
    assert reasons(report)["b.weight"] == "its forward was replaced, which another layer would lose"
    assert reasons(report)["c.weight"].startswith("its max_norm is 1.0, expected None")


def test_experts_are_a_kind_of_their_own() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def make(activation: str = "silu") -> nn.ModuleDict:
        config = MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=2, hidden_act=activation)
        experts = MixtralExperts(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
        return nn.ModuleDict({"experts": experts, "linear": nn.Linear(32, 32)})

    model = make()
    report = quantize(model, QConfig("int8", rules=(QRule("experts", "fp8"),)))
    assert isinstance(model["experts"], QuantizedExperts)
    assert [(layer.kind, layer.format, layer.shapes) for layer in report.quantized] == [
        ("fused experts", "fp8", ((2, 32, 32), (2, 32, 16))),
        ("linear layer", "int8, threshold 6", ((32, 32),)),
    ]
    assert "fused experts to fp8, 1 " in str(report)

    model = make("gelu")
    report = quantize(model, QConfig())
    assert reasons(report)["experts.gate_up_proj"] == "its activation isn't silu(gate) * up"
    model = make()
    with torch.no_grad():
        model["experts"].down_proj[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"experts.down_proj has 1 elements that are NaN"):
        quantize(model, QConfig())
    assert not formats_of(model)
