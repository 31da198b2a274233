"""Adapters in PEFT's files, both ways with PEFT itself; files that lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from q_nn import (
    LoRAConfig,
    QConfig,
    add_lora,
    load_lora,
    lora_adapters,
    merge_lora,
    quantize,
    save_lora,
    set_lora,
)
from q_nn.lora.peft_config import WITHOUT_EFFECT
from q_nn.lora.targets import by_pattern, is_meant

MakeLlama = Callable[..., LlamaForCausalLM]
Fill = Callable[[nn.Module], None]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "dropout": 0.1},
    "dora": {"dora": True, "init": "gaussian"},
    "patterns": {
        "target": ("q_proj", "down_proj"),
        "rslora": True,
        "rank_pattern": {"q_proj": 3, r"layers\.1\..*": 5},
        "alpha_pattern": {r".*\.1\.self_attn.*": 2.5},
    },
    "expression": {"target": r".*\.(q|v)_proj", "exclude": r".*\.0\..*", "dora": True, "rslora": True},
    "layers": {"target": ("q_proj", "up_proj"), "layers": (1,), "layers_pattern": ("layers",), "exclude": ("up_proj",)},
    "modules": {"modules_to_save": ("lm_head", "norm", "layers.0.mlp.up_proj"), "alpha": 3.0},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def to_peft(settings: dict[str, Any]) -> LoraConfig:
    """The same config in PEFT's words."""
    names = {"alpha": "lora_alpha", "dropout": "lora_dropout", "target": "target_modules", "exclude": "exclude_modules"}
    names |= {"layers": "layers_to_transform", "rslora": "use_rslora", "dora": "use_dora", "init": "init_lora_weights"}
    settings = {"alpha": 16, "target": "all-linear", **settings}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return LoraConfig(r=4, **{names.get(name, name): value for name, value in listed.items()})


def fill_peft(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if "lora_B" in name else parameter * (1 + noise))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(ids).logits
    return result


def train_a_bit(model: LlamaForCausalLM, trainable: list[nn.Parameter], ids: Tensor) -> None:
    optimizer = torch.optim.AdamW(trainable, lr=2e-2)
    for _ in range(2):
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


@kinds
def test_ours_loads_in_peft(make_llama: MakeLlama, ids: Tensor, kind: str, tmp_path: Path) -> None:
    model = make_llama()
    config = LoRAConfig(rank=4, **KINDS[kind])
    trainable = add_lora(model, config)
    train_a_bit(model, trainable, ids)
    save_lora(model, tmp_path)
    theirs = PeftModel.from_pretrained(make_llama(), tmp_path)
    ours, base = logits(model, ids), logits(make_llama(), ids)
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(logits(theirs, ids), ours, rtol=1e-5, atol=1e-5)
    merge_lora(model)
    torch.testing.assert_close(logits(model, ids), logits(theirs.merge_and_unload(), ids), rtol=1e-5, atol=1e-5)

    other = make_llama()
    parameters = load_lora(other, tmp_path, name="other")
    assert lora_adapters(other)["other"].rslora == config.rslora
    assert torch.equal(logits(other, ids), ours)
    assert len(parameters) == len(trainable) and not any(parameter.requires_grad for parameter in other.parameters())


@kinds
def test_pefts_loads_here(make_llama: MakeLlama, ids: Tensor, kind: str, tmp_path: Path) -> None:
    settings = KINDS[kind]
    if kind == "patterns":  # PEFT sorts them as it saves, so that where two match it doesn't know its own adapter again
        settings = settings | {"rank_pattern": {"q_proj": 3, r"layers\.1\.mlp.*": 5}}
    theirs = get_peft_model(make_llama(), to_peft(settings))
    fill_peft(theirs)
    theirs.save_pretrained(tmp_path)
    model = make_llama()
    base = logits(model, ids)
    parameters = load_lora(model, tmp_path, trainable=True)
    assert (logits(model, ids) - base).abs().max() > 0.01
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}

    save_lora(model, tmp_path / "again")
    assert read(tmp_path / "again").keys() == read(tmp_path).keys()
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "again")
    torch.testing.assert_close(logits(again, ids), logits(theirs, ids))


@pytest.mark.parametrize("dora", [False, True])
def test_one_training_step_equals_pefts(make_llama: MakeLlama, ids: Tensor, dora: bool, tmp_path: Path) -> None:
    """Gradients too, with dropout: it draws the same random numbers."""
    theirs = get_peft_model(make_llama(), LoraConfig(r=4, target_modules="all-linear", use_dora=dora, lora_dropout=0.3))
    fill_peft(theirs)
    theirs.save_pretrained(tmp_path)
    model = make_llama()
    load_lora(model, tmp_path, trainable=True)
    gradients = []
    for each in (theirs, model):
        torch.manual_seed(5)
        each.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        named = {
            name.removeprefix("base_model.model.").replace(".adapters.default.", ".").replace(".default", ""): parameter.grad
            for name, parameter in each.named_parameters()
            if parameter.grad is not None
        }
        gradients.append({name.removesuffix(".weight"): gradient for name, gradient in named.items()})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 14 * (3 if dora else 2)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_several_adapters_both_ways(make_llama: MakeLlama, ids: Tensor, fill: Fill, tmp_path: Path) -> None:
    model = make_llama()
    configs = {"default": LoRAConfig(rank=4), "b": LoRAConfig(rank=2, rslora=True, target=("q_proj",))}
    for name, config in configs.items():
        add_lora(model, config, name=name)
    fill(model)
    save_lora(model, tmp_path)
    save_lora(model, tmp_path / "b", name="b")
    theirs = PeftModel.from_pretrained(make_llama(), tmp_path)
    theirs.load_adapter(tmp_path / "b", "b")
    both = make_llama()
    for names in (("default",), ("b",), ("default", "b")):
        set_lora(model, names)
        theirs.base_model.set_adapter(list(names))
        torch.testing.assert_close(logits(model, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    load_lora(both, tmp_path / "theirs")
    load_lora(both, tmp_path / "theirs" / "b", name="b")
    set_lora(both, ("default", "b"))
    torch.testing.assert_close(logits(both, ids), logits(model, ids))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["nf4", "int8_weight_only"])
def test_over_a_quantized_base(make_llama: MakeLlama, ids: Tensor, fill: Fill, format: Any, dora: bool, tmp_path: Path) -> None:
    """An adapter that was trained over a quantized base is the same over the weights that it decodes to, in PEFT."""
    model = make_llama()
    quantize(model, QConfig(format))
    add_lora(model, LoRAConfig(rank=4, dora=dora))
    fill(model)
    save_lora(model, tmp_path)
    dense = make_llama()
    names = [name for name, place in model.named_modules() if hasattr(place, "adapters") and "base_layer" not in name]
    with torch.no_grad():
        for name in names:
            dense.get_submodule(name).weight.copy_(model.get_submodule(name).weight.dequantize())
    torch.testing.assert_close(logits(PeftModel.from_pretrained(dense, tmp_path), ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    again = make_llama()
    quantize(again, QConfig(format))
    load_lora(again, tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_dtype_of_a_file_and_of_the_adapter(make_llama: MakeLlama, ids: Tensor, fill: Fill, tmp_path: Path) -> None:
    model = make_llama()
    add_lora(model, LoRAConfig(rank=4, dtype=torch.bfloat16))
    fill(model)
    save_lora(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    for dtype in (torch.float32, torch.float16):
        other = make_llama()
        assert {parameter.dtype for parameter in load_lora(other, tmp_path, dtype=dtype)} == {dtype}
        torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=0.02, atol=0.02)


def test_a_name_that_ends_another_is_written_as_an_expression(fill: Fill, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)
            self.head = nn.ModuleDict({"proj": nn.Linear(8, 8)})

        def get_output_embeddings(self) -> nn.Module:
            return self.head["proj"]

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head["proj"](self.proj(x))
            return result

    model = Model()
    add_lora(model, LoRAConfig(rank=2))
    fill(model)
    save_lora(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "proj"
    other = Model()
    other.load_state_dict({name.replace("base_layer.", ""): t for name, t in model.state_dict().items() if "adapters" not in name})
    x = torch.randn(3, 8)
    torch.testing.assert_close(PeftModel.from_pretrained(other, tmp_path)(x), model(x))


PARTS = st.sampled_from(["a", "b", "ab", "layers", "h", "0", "1", "12"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
CHOICES = st.lists(NAMES, min_size=1, max_size=2).map(tuple) | st.sampled_from([r".*\.a", r"(.*\.)?b", r"layers\..*", "a|b"])


@given(
    name=NAMES, target=CHOICES, exclude=st.just(()) | CHOICES, layers=st.none() | st.sampled_from([(0,), (1, 12)]), data=st.data()
)
def test_names_mean_what_they_mean_in_peft(name: str, target: Any, exclude: Any, layers: Any, data: st.DataObject) -> None:
    if isinstance(target, str):
        layers = None
    pattern = data.draw(st.just(()) | st.sampled_from([("layers",), ("h", "layers")])) if layers else ()
    ours = LoRAConfig(target=target, exclude=exclude, layers=layers, layers_pattern=pattern)
    theirs = LoraConfig(
        target_modules=list(target) if isinstance(target, tuple) else target,
        exclude_modules=list(exclude) if isinstance(exclude, tuple) else exclude,
        layers_to_transform=list(layers) if layers else None,
        layers_pattern=list(pattern) or None,
    )
    assert is_meant(name, nn.Linear(1, 1), False, ours) == bool(check_target_module_exists(theirs, name))


@given(name=NAMES, patterns=st.lists(NAMES | st.sampled_from([".*", r"layers\.\d+\..*", "a|b"]), unique=True, max_size=3))
def test_patterns_mean_what_they_mean_in_peft(name: str, patterns: list[str]) -> None:
    ranks = {pattern: rank for rank, pattern in enumerate(patterns)}
    assert by_pattern(name, ranks, -1) == ranks.get(get_pattern_key(patterns, name), -1)


# --- files that lie -------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    return tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_lora(small_model(adapted=True), folder)
    return folder


def small_model(*, adapted: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    if adapted:
        add_lora(model, LoRAConfig(rank=2, dora=True))
    return model


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def assert_refused(folder: Path, message: str, error: type[Exception] = ValueError, **options: Any) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_lora(model, folder, **options)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def change(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | settings))


def test_it_loads_unless_changed(folder: Path) -> None:
    load_lora(small_model(), folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, which isn't supported"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"what_comes_next_year": 0.5}, "what_comes_next_year is 0.5, which isn't supported"),
        ({"r": None}, "r is missing"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"r": "2"}, "rank is '2'"),
        ({"r": 3}, r"lora_A.weight has shape \[2, 16\], expected \[3, 16\]"),
        ({"r": 10**30}, r"expected \[1000000000000000000000000000000, 16\]"),
        ({"r": 10**9, "target_modules": ["0"]}, "unexpected keys"),
        ({"lora_alpha": -1}, "alpha is -1"),
        ({"lora_dropout": 2}, "dropout is 2"),
        ({"target_modules": ["7"]}, "means no linear layer"),
        ({"target_modules": [3]}, "target is"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": ["1"]}, "means 1, which is ReLU"),
        ({"rank_pattern": {"0": 3}}, "has shape"),
        ({"rank_pattern": [3]}, "rank_pattern is"),
        ({"use_dora": False}, "unexpected keys: .*lora_magnitude_vector"),
        ({"use_dora": 1}, "dora is 1"),
        ({"modules_to_save": ["2"]}, "missing keys: base_model.model.2.bias, base_model.model.2.weight"),
        ({"layers_to_transform": [0], "target_modules": "0|2"}, "layers is given and target is"),
    ],
    ids=str,
)
def test_settings_that_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    change(folder, **settings)
    assert_refused(folder, rf"{CONFIG}|{WEIGHTS}|load_lora")
    assert_refused(folder, message)


def test_settings_without_effect(folder: Path) -> None:
    change(folder, **dict.fromkeys(WITHOUT_EFFECT, "anything"))
    change(folder, modules_to_save=None, layers_to_transform=[], layers_pattern="", what_comes_next_year=None, nor_that=False)
    load_lora(small_model(), folder)


def test_every_setting_of_peft_is_judged() -> None:
    """What PEFT has is read, without effect, or refused by name when it is made use of; and the table names nothing else."""
    written = LoraConfig(r=2, target_modules=["0"]).to_dict()
    assert WITHOUT_EFFECT.keys() - {"runtime_config"} <= written.keys()
    unset = {name for name, value in written.items() if value in (None, False, {}, [])}
    always = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "init_lora_weights"}
    assert written.keys() == unset | always | (WITHOUT_EFFECT.keys() & written.keys())


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = read(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(A), rf"missing keys: {A}; unexpected keys: none"),
        (lambda t: t.update(more=torch.zeros(1)), "missing keys: none; unexpected keys: more"),
        (lambda t: t.update({A: torch.zeros(2, 15)}), r"has shape \[2, 15\], expected \[2, 16\]"),
        (
            lambda t: t.update({A: torch.zeros(3, 16), B: torch.zeros(8, 3)}),
            r"has shape \[3, 16\], expected \[2, 16\] by adapter_conf",
        ),
        (lambda t: t.update({A: torch.zeros(2, 16, dtype=torch.int8)}), "has dtype int8, expected floating point"),
        (lambda t: t.update({A: torch.full((2, 16), float("nan"))}), "NaN or infinite"),
    ],
)
def test_weights_that_are_refused(folder: Path, edit: Any, message: str) -> None:
    with_tensors(folder, edit)
    assert_refused(folder, message)


def test_files_that_are_missing_or_broken(folder: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", f"{CONFIG}: no such file", FileNotFoundError)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-8])
    assert_refused(folder, "is not a safetensors file")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert_refused(folder, "adapter_model.bin is a pickle", FileNotFoundError)
    for text, message in (("{", "is not JSON"), ("[]", "JSON of a list"), ("[" * 100_000, "is not JSON")):
        (folder / CONFIG).write_text(text)
        assert_refused(folder, message)


def test_names_and_models_that_are_refused(folder: Path, tmp_path: Path) -> None:
    assert_refused(folder, "name is 'a.b'", name="a.b")
    model = small_model(adapted=True)
    with pytest.raises(ValueError, match="adapter 'default' already"):
        load_lora(model, folder)
    with pytest.raises(ValueError, match="no adapter 'b', expected of default"):
        save_lora(model, tmp_path / "new", name="b")
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        load_lora(small_model().to("meta"), folder)
    with pytest.raises(ValueError, match=r"0\.lora_.* is on the meta device"):
        save_lora(model.to("meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = small_model(adapted=True)
    nn.init.ones_(model[0].adapters["default"].lora_B.weight)

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("q_nn.lora.peft_files._write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        save_lora(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    save_lora(model, folder)
    assert bool((read(folder)[B] == 1).all())
