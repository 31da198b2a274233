"""Which layers get adapters; several adapters in one model; modules to save; merging and unmerging.

Long, because each of these is tried over every kind of layer, with the same few helpers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import (
    Linear4bit,
    Linear8bitLt,
    LoRAConfig,
    LoRALinear,
    QConfig,
    add_lora,
    disable_lora,
    enable_lora,
    load_into,
    lora_adapters,
    merge_lora,
    quantize,
    remove_lora,
    replace_linears,
    save_pretrained,
    set_lora,
    unmerge_lora,
    weight_bytes,
)
from q_nn.lora import TrainedModule

MakeLlama = Callable[..., LlamaForCausalLM]
Fill = Callable[[nn.Module], None]
FORMATS = [None, "nf4", "fp4", "int4", "nvfp4", "int8", "int8_weight_only"]
formats = pytest.mark.parametrize("format", FORMATS)


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a failed call must leave alone."""
    names = {name: type(module) for name, module in model.named_modules()}
    return {
        "modules": names,
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "active": [getattr(module, "active", None) for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, expected = after.pop("state"), before.pop("state")
    assert after == before
    assert list(state) == list(expected)
    assert all(torch.equal(state[name].nan_to_num(), expected[name].nan_to_num()) for name in state)
    before["state"] = expected


# --- targets --------------------------------------------------------------------------------------------------------------


def test_targets(make_llama: MakeLlama) -> None:
    def found(**settings: Any) -> set[str]:
        model = make_llama()
        add_lora(model, LoRAConfig(**settings))
        return adapted(model)

    everything = found()
    assert len(everything) == 14
    assert found(target=("q_proj", "layers.0.mlp.up_proj")) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }
    assert found(target=r".*layers\.1.*_proj") == {name for name in everything if ".1." in name}
    assert found(target=("lm_head",)) == {"lm_head"}
    assert found(exclude=("q_proj",)) == {name for name in everything if "q_proj" not in name}
    assert found(exclude=r".*layers\.0\..*") == {name for name in everything if ".1." in name}
    assert found(target=("q_proj",), layers=(1,)) == {"model.layers.1.self_attn.q_proj"}
    assert found(target=("q_proj",), layers=(0, 7), layers_pattern=("layers",)) == {"model.layers.0.self_attn.q_proj"}
    assert found(modules_to_save=("layers.0.mlp", "lm_head")) == {name for name in everything if ".0.mlp" not in name}


def test_ranks_and_alphas_by_pattern(make_llama: MakeLlama) -> None:
    model = make_llama()
    patterns = {"q_proj": 3, r"layers\.1\..*_proj": 5}
    add_lora(model, LoRAConfig(rank=2, alpha=4.0, rank_pattern=patterns, alpha_pattern={r".*\.0\..*": 7.0}))
    for name in adapted(model):
        adapter = model.get_submodule(name).adapters["default"]
        rank = 3 if "q_proj" in name else 5 if ".1." in name else 2
        assert adapter.lora_A.weight.shape[0] == adapter.lora_B.weight.shape[1] == rank
        assert adapter.scaling == (7 if ".0." in name else 4) / rank


class Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32)
        self.table = nn.Embedding(4, 16)
        self.free = nn.Linear(16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": ("proj",)}, "means no linear layer; the model has attention.out_proj, layer"),
        ({"target": ("table",)}, r"means table, which is Embedding"),
        ({"target": ("free", "attention")}, "means attention, which is MultiheadAttention"),
        ({"target": ("out_proj",)}, r"attention.out_proj, whose weight MultiheadAttention reads without calling"),
        ({"target": "layer.linear1"}, "whose weight TransformerEncoderLayer reads"),
        ({"rank_pattern": {"up": 3}}, "rank_pattern 'up' means none"),
        ({"alpha_pattern": {"fre": 3}}, "alpha_pattern 'fre' means none"),
        ({"modules_to_save": ("head",)}, "'head', with which no module"),
        ({"modules_to_save": ("layer", "layer.linear1")}, "means layer.linear1, and a module that it is in"),
    ],
)
def test_what_can_not_be_adapted_is_refused(settings: dict[str, Any], message: str) -> None:
    model = Bypassing()
    before = snapshot(model)
    if "target" not in settings:
        settings = {"target": ("free",), **settings}
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(**settings))
    assert_unchanged(model, before)


def test_a_model_that_does_not_know_its_embeddings() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError  # as transformers does for some

    model = Model()
    add_lora(model, LoRAConfig())
    assert adapted(model) == {"layer"}


def test_conv1d_of_gpt2_is_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16))
    with pytest.raises(ValueError, match=r"means transformer.h.0.attn.c_attn, which is Conv1D"):
        add_lora(model, LoRAConfig(target=("c_attn",)))
    assert not adapted(model)


def test_what_is_tied_or_quantized_is_refused(make_llama: MakeLlama) -> None:
    model = make_llama(tied=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied"):
        add_lora(model, LoRAConfig(target=("lm_head",)))
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match=rf"modules_to_save means .*{name}, which is tied"):
            add_lora(model, LoRAConfig(modules_to_save=(name,)))
    assert_unchanged(model, before)
    quantize(model, QConfig())
    with pytest.raises(ValueError, match=r"q_proj, which is quantized and so doesn't train"):
        add_lora(model, LoRAConfig(modules_to_save=("q_proj",)))


def test_what_takes_bare_models_refuses_adapted_ones(make_llama: MakeLlama, tmp_path: Path) -> None:
    model = make_llama()
    save_pretrained(model, tmp_path)
    add_lora(model, LoRAConfig())
    before = snapshot(model)
    for call, message in (
        (lambda: quantize(model, QConfig()), r"quantize: model\.layers\.0\.self_attn\.q_proj has adapters"),
        (lambda: replace_linears(model, {"load_in_4bit": True}), r"replace_linears: .*has adapters"),
        (lambda: load_into(model, tmp_path), r"load_into: missing keys"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": 2.0}, ValueError),
        ({"rank": True}, ValueError),
        ({"alpha": 0}, ValueError),
        ({"alpha": float("inf")}, ValueError),
        ({"alpha": True}, ValueError),
        ({"dropout": 1.0}, ValueError),
        ({"target": "("}, ValueError),
        ({"target": ()}, TypeError),
        ({"target": ["q_proj"]}, TypeError),
        ({"exclude": "("}, ValueError),
        ({"exclude": ("",)}, TypeError),
        ({"layers": (), "target": ("a",)}, ValueError),
        ({"layers": (-1,), "target": ("a",)}, ValueError),
        ({"layers": (0,)}, ValueError),
        ({"layers_pattern": ("h",)}, ValueError),
        ({"layers_pattern": ("(",), "layers": (0,), "target": ("a",)}, ValueError),
        ({"rank_pattern": {"a": 0}}, ValueError),
        ({"rank_pattern": {"(": 1}}, ValueError),
        ({"rank_pattern": {"(?i)a": 1}}, ValueError),
        ({"layers_pattern": ("(?P<index>h)",), "layers": (0,), "target": ("a",)}, ValueError),
        ({"target": "a{99999999999999999999}"}, ValueError),
        ({"alpha": 10**400}, ValueError),
        ({"rank_pattern": {3: 1}}, TypeError),
        ({"rank_pattern": [("a", 1)]}, TypeError),
        ({"alpha_pattern": {"a": -1.0}}, ValueError),
        ({"rslora": 1}, TypeError),
        ({"dora": "no"}, TypeError),
        ({"modules_to_save": "lm_head"}, TypeError),
        ({"init": "pissa"}, ValueError),
        ({"dtype": torch.int8}, ValueError),
        ({"r": 8}, TypeError),
    ],
    ids=str,
)
def test_config_is_checked(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        LoRAConfig(**settings)


def test_config_is_a_value() -> None:
    ranks = {"a": 2}
    config = LoRAConfig(rank_pattern=ranks)
    same = LoRAConfig(rank_pattern={"a": 2})
    ranks["a"] = 3
    assert config == same != LoRAConfig(rank_pattern=ranks)
    assert hash(config) == hash(same)


# --- several adapters -----------------------------------------------------------------------------------------------------


def outputs(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("format", [None, "nf4"])
def test_several_adapters(make_llama: MakeLlama, ids: Tensor, fill: Fill, format: Any) -> None:
    model = make_llama()
    if format:
        quantize(model, QConfig(format))
    base, bare = outputs(model, ids), snapshot(model)
    trainable: dict[str, list[nn.Parameter]] = {}
    configs = {
        "a": LoRAConfig(rank=2),
        "b": LoRAConfig(rank=3, target=("q_proj", "down_proj"), rslora=True),
        "c": LoRAConfig(target=("v_proj",), dora=True, modules_to_save=("lm_head",)),
    }
    alone = {}
    for name, config in configs.items():
        trainable[name] = add_lora(model, config, name=name)
        fill(model)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable[name]}
    assert lora_adapters(model) == configs
    assert len(adapted(model)) == 14
    nn.init.normal_(model.lm_head.weight, std=0.05)

    for name in configs:
        set_lora(model, name)
        alone[name] = outputs(model, ids)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable[name]}
    assert not any(torch.allclose(alone[x], y) for x, y in (("a", base), ("a", alone["b"]), ("b", base), ("c", base)))
    set_lora(model, ["a", "b"], trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    both = outputs(model, ids)

    with disable_lora(model):
        assert torch.equal(outputs(model, ids), base)
        with disable_lora(model):
            assert torch.equal(outputs(model, ids), base)
        assert torch.equal(outputs(model, ids), base)
    assert torch.equal(outputs(model, ids), both)
    disable_lora(model)
    assert torch.equal(outputs(model, ids), base)
    with pytest.raises(ValueError, match="disabled; call enable_lora"):
        merge_lora(model)
    enable_lora(model)
    assert torch.equal(outputs(model, ids), both)

    before = snapshot(model)
    for names, message in (
        ("d", "no adapter 'd', expected of a, b, c"),
        (["a", "c"], "'c' is a DoRA adapter"),
        ([], "names is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            set_lora(model, names)
    for name in ("a", "", "x.y", "keys", "training"):
        with pytest.raises(ValueError, match=r"adapter 'a' already|name is"):
            add_lora(model, LoRAConfig(), name=name)
    with pytest.raises(ValueError, match="no adapter 'default'"):
        remove_lora(model)
    assert_unchanged(model, before)

    set_lora(model, "c")
    remove_lora(model, "a")
    assert len(adapted(model)) == 6
    assert torch.equal(outputs(model, ids), alone["c"])
    remove_lora(model, "c")
    with pytest.raises(ValueError, match="no adapter is active"):
        merge_lora(model)
    assert torch.equal(outputs(model, ids), base)
    set_lora(model, "b")
    assert torch.equal(outputs(model, ids), alone["b"])
    remove_lora(model, "b")
    bare["trains"] = dict.fromkeys(bare["trains"], False)
    assert_unchanged(model, bare)
    with pytest.raises(ValueError, match="no adapters"):
        disable_lora(model)


def test_two_copies_of_one_module(make_llama: MakeLlama, ids: Tensor, fill: Fill) -> None:
    model = make_llama()
    base = outputs(model, ids)
    for name in ("a", "b"):
        trainable = add_lora(model, LoRAConfig(target=("q_proj",), modules_to_save=("lm_head", ".norm")), name=name)
        copies = (model.lm_head.in_use(), model.model.norm.in_use())
        assert {id(p) for module in copies for p in module.parameters()} < {id(p) for p in trainable}
        assert torch.equal(outputs(model, ids), base)
    nn.init.normal_(model.lm_head.weight)
    assert isinstance(model.lm_head, TrainedModule) and isinstance(model.model.norm, TrainedModule)
    assert not torch.equal(outputs(model, ids), base)
    with pytest.raises(ValueError, match="'a' and 'b' both train a copy of"):
        set_lora(model, ("a", "b"))
    with disable_lora(model):
        assert torch.equal(outputs(model, ids), base)
    set_lora(model, "a")
    assert torch.equal(outputs(model, ids), base)
    with pytest.raises(ValueError, match=r"means lm_head, which another adapter trains as a whole"):
        add_lora(model, LoRAConfig(target=("lm_head",)), name="c")
    with pytest.raises(ValueError, match=r"self_attn, which other adapters are in"):
        add_lora(model, LoRAConfig(target=("up_proj",), modules_to_save=("self_attn",)), name="c")
    set_lora(model, "b")
    expected, head = outputs(model, ids), model.lm_head.weight
    merge_lora(model)
    assert torch.equal(outputs(model, ids), expected)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is head
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_trained_embeddings_and_their_gradients(make_llama: MakeLlama, ids: Tensor) -> None:
    model = make_llama().train()
    trainable = add_lora(model, LoRAConfig(target=("q_proj",), modules_to_save=("embed_tokens",)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert sum(p.numel() for p in trainable if p.grad is not None and bool(p.grad.any())) > 96 * 128
    assert model.model.embed_tokens.base_layer.weight.grad is None


# --- merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@formats
def test_merge(make_llama: MakeLlama, ids: Tensor, fill: Fill, format: Any, dora: bool) -> None:
    model = make_llama()
    if format:
        quantize(model, QConfig(format))
    add_lora(model, LoRAConfig(rank=4, dora=dora))
    fill(model)
    expected = {}
    for name in adapted(model):
        place = model.get_submodule(name)
        weight, adapter = place.weight, place.adapters["default"]
        dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.detach().clone()
        dense = dense + adapter.lora_B.weight.detach() @ adapter.lora_A.weight.detach() * adapter.scaling
        if dora:
            dense = dense * (adapter.lora_magnitude_vector / dense.norm(dim=1)).detach()[:, None]
        expected[name] = dense
    before, other = outputs(model, ids), copy.deepcopy(model)
    merge_lora(model)
    assert not adapted(model)
    for name, dense in expected.items():
        weight = model.get_submodule(name).weight
        if isinstance(weight, QuantizedTensor):
            bound = (QuantizedTensor.quantize(dense, weight.format).dequantize() - dense).abs().max() * 1.5
            assert (weight.dequantize() - dense).abs().max() <= bound
            if not dora:
                assert torch.equal(weight, QuantizedTensor.quantize(dense, weight.format))
        else:
            torch.testing.assert_close(weight, dense)
    if not format:
        torch.testing.assert_close(outputs(model, ids), before)

    merge_lora(other, dense=True)  # nothing is rounded again
    for name, dense in expected.items():
        assert type(other.get_submodule(name)) is nn.Linear
        torch.testing.assert_close(other.get_submodule(name).weight.detach(), dense)
    if format != "int8":  # which rounds activations as well
        torch.testing.assert_close(outputs(other, ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
@formats
def test_reversible_merge(make_llama: MakeLlama, ids: Tensor, fill: Fill, format: Any, dense: bool, tmp_path: Path) -> None:
    model = make_llama()
    if format:
        quantize(model, QConfig(format))
    add_lora(model, LoRAConfig(rank=4, modules_to_save=("lm_head",)))
    fill(model)
    for_good = copy.deepcopy(model)
    merge_lora(for_good, dense=dense)
    before, expected = outputs(model, ids), outputs(for_good, ids)
    with disable_lora(model):
        base = outputs(model, ids)
    unmerged, size = snapshot(model), weight_bytes(model)

    merge_lora(model, dense=dense, reversible=True)
    assert torch.equal(outputs(model, ids), expected)
    merged_bytes = sum(weight_bytes(for_good.get_submodule(name)) for name in adapted(model))
    assert weight_bytes(model) == size + merged_bytes
    with disable_lora(model):
        assert torch.equal(outputs(model, ids), base)
    state = model.state_dict()
    assert list(state) == list(unmerged["state"])
    assert all(torch.equal(tensor, unmerged["state"][name]) for name, tensor in state.items())
    assert torch.equal(outputs(copy.deepcopy(model), ids), expected)
    merged_twin = copy.deepcopy(model).bfloat16()
    assert (
        next(module for module in merged_twin.modules() if isinstance(module, LoRALinear)).merged_layer.weight.dtype
        == torch.bfloat16
    )

    for call, message in (
        (lambda: merge_lora(model), "merged already"),
        (lambda: add_lora(model, LoRAConfig(), name="b"), "are merged; call unmerge_lora"),
        (lambda: set_lora(model, "default"), "are merged"),
        (lambda: remove_lora(model), "are merged"),
        (lambda: model.train()(ids), "merged and wouldn't train"),
        (lambda: save_pretrained(model, tmp_path), "merge_lora"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"q_proj: its adapters are merged.*unmerge_lora"):
        model.eval().load_state_dict(state)
    unmerge_lora(model)
    assert_unchanged(model, unmerged)
    assert torch.equal(outputs(model, ids), before)
    with pytest.raises(ValueError, match="nothing in the model is merged"):
        unmerge_lora(model)


def test_settings_of_an_int8_layer_stay_when_merged(fill: Fill) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize(model, QConfig("int8", threshold=6.0))
    add_lora(model, LoRAConfig())
    fill(model)
    merge_lora(model, reversible=True)
    assert model[0].merged_layer.threshold == 6.0
    unmerge_lora(model)
    merge_lora(model)
    assert model[0].threshold == 6.0


def test_a_base_with_weights_of_its_own_to_train(fill: Fill) -> None:
    """LLM.int8() of dense weights, which adapters freeze."""
    model = nn.Sequential(Linear8bitLt(64, 32, has_fp16_weights=True)).eval()
    base = model[0].weight.detach().clone()
    add_lora(model, LoRAConfig())
    fill(model)
    x = torch.randn(5, 64)
    expected = model(x)
    expected.sum().backward()
    assert model[0].weight.grad is None
    merge_lora(model, reversible=True)
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)
    assert model[0].merged_layer.has_fp16_weights
    unmerge_lora(model)
    assert torch.equal(model(x), expected) and torch.equal(model[0].weight, base)


def test_merging_adds_the_active_adapters_alone(fill: Fill) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8), Linear4bit(8, 5)).eval()
    untouched = model[2].weight.dequantize()
    x = torch.randn(3, 64)
    for name, target in (("a", ("0", "1")), ("b", "all-linear"), ("c", ("1",))):
        add_lora(model, LoRAConfig(target=target), name=name)
    fill(model)
    set_lora(model, ("a", "c"))
    expected = model(x)
    merge_lora(model, reversible=True)
    torch.testing.assert_close(model(x), expected)
    assert model[2].merged_layer is None
    unmerge_lora(model)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model[2].weight.dequantize(), untouched)


def test_a_base_whose_forward_was_replaced(fill: Fill) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)).eval()
    add_hook_to_module(model[1], AlignDevicesHook(io_same_device=True))
    add_lora(model, LoRAConfig())
    fill(model)
    x = torch.randn(3, 64)
    before, expected = snapshot(model), model(x)
    with pytest.raises(ValueError, match="forward was replaced"):
        merge_lora(model, reversible=True)
    assert_unchanged(model, before)
    merge_lora(model)
    torch.testing.assert_close(model(x), expected)


def test_nothing_is_merged_if_a_weight_would_not_be_finite(fill: Fill) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8).half())
    with pytest.raises(ValueError, match="no adapters"):
        merge_lora(model)
    add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="already"):
        add_lora(model, LoRAConfig())
    fill(model)
    last = model[1].adapters["default"].lora_B.weight
    with torch.no_grad():
        last[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter of 1"):
        merge_lora(model)
    assert_unchanged(model, before)
    with torch.no_grad():
        last[0] = 1e8  # finite in float32, infinite in the weight's float16
    before = snapshot(model)
    for reversible in (False, True):
        with pytest.raises(ValueError, match=r"1\.weight would have elements"):
            merge_lora(model, reversible=reversible)
        assert_unchanged(model, before)


@pytest.mark.parametrize("plain", [False, True])
def test_rows_that_are_no_blocks_and_plain_layers_with_quantized_weights(plain: bool, fill: Fill) -> None:
    model = nn.Sequential(Linear4bit(33, 7))
    if plain:
        layer = nn.Linear(33, 7)
        layer.weight, layer.bias = model[0].weight, model[0].bias
        model = nn.Sequential(layer)
    add_lora(model, LoRAConfig(rank=2, dora=True))
    fill(model)
    x = torch.randn(3, 33)
    expected = model(x)
    again = copy.deepcopy(model).eval()
    merge_lora(again, reversible=True)
    merged = again(x)
    assert isinstance(again[0].merged_layer.weight, QuantizedTensor)
    unmerge_lora(again)
    assert torch.equal(again(x), expected)
    merge_lora(again)
    assert torch.equal(again(x), merged)
    merge_lora(model, dense=True)
    torch.testing.assert_close(model(x), expected)
