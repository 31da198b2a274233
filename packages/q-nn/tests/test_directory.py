"""Hugging Face directories: saved whole or not at all, loaded strictly."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import q_nn.save
from q_nn import (
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    LoRAConfig,
    QConfig,
    add_lora,
    load_into,
    quantize,
    replace_linears,
    save_pretrained,
)

MakeLlama = Callable[..., LlamaForCausalLM]
CONFIGS = [
    QConfig("nf4"),
    QConfig("fp4", blocksize=32, double_quant=False),
    QConfig("int8"),
    QConfig(skip=("lm_head", "down_proj")),
]


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("config", [None, *CONFIGS], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(make_llama: MakeLlama, ids: Tensor, tmp_path: Path, config: QConfig | None, tied: bool) -> None:
    model = make_llama(dtype=torch.bfloat16, tied=tied)
    if config:
        quantize(model, config)
    save_pretrained(model, tmp_path / "new" / "model")
    other = make_llama(dtype=torch.bfloat16, tied=tied, seed=1)
    load_into(other, tmp_path / "new" / "model")
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    assert {n: type(m) for n, m in other.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    load_into(other, tmp_path / "new" / "model")  # also into one that is quantized already


def test_parameters_on_meta_come_alive(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama(tied=True)
    quantize(model, QConfig())
    save_pretrained(model, tmp_path)
    buffers = dict(make_llama().named_buffers())
    with torch.device("meta"):
        other = LlamaForCausalLM(model.config).eval()
    with pytest.raises(ValueError, match=r"buffer .*inv_freq is on the meta device"):
        load_into(other, tmp_path)
    assert all(parameter.is_meta for parameter in other.parameters())
    for name, buffer in buffers.items():
        parent, _, own = name.rpartition(".")
        other.get_submodule(parent).register_buffer(own, buffer, persistent=False)
    load_into(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert other.lm_head.weight is other.model.embed_tokens.weight


@pytest.mark.parametrize("config", CONFIGS[:3], ids=str)
def test_the_models_dtype_wins(make_llama: MakeLlama, tmp_path: Path, config: QConfig) -> None:
    model = make_llama(dtype=torch.bfloat16)
    quantize(model, config)
    save_pretrained(model, tmp_path)
    other = make_llama(dtype=torch.float32, seed=1)
    load_into(other, tmp_path)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    for ours, theirs in zip(other.parameters(), model.float().parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_config_says_what_was_done(make_llama: MakeLlama, tmp_path: Path) -> None:
    model = make_llama(dtype=torch.bfloat16)
    quantize(model, QConfig(skip=("lm_head", "0.mlp.up_proj")))
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["model.layers.0.mlp.up_proj", "lm_head"],
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    assert (tmp_path / "generation_config.json").exists()
    assert sorted(files(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors"]


def test_skipped_names_that_are_suffixes_of_quantized_ones() -> None:
    from q_nn.hf_config import BitsAndBytesConfig, quantization_config
    from q_nn.replace import plan_replacements

    def make() -> nn.Module:
        return nn.ModuleDict({"proj": nn.Linear(64, 64), "inner": nn.ModuleDict({"proj": nn.Linear(64, 64)})})

    model = make()
    quantize(model, QConfig(skip=("^proj",)))
    settings = quantization_config(model, torch.float32)
    assert settings is not None
    assert list(plan_replacements(make(), BitsAndBytesConfig.from_dict(settings))) == ["inner.proj"]


@pytest.mark.parametrize(
    ("failing", "name"),
    [("save_file", "model.safetensors"), ("_write_json", "config.json")],
)
def test_a_failed_save_leaves_the_old_files(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, name: str
) -> None:
    save_pretrained(make_llama(), tmp_path)
    before = files(tmp_path)

    def full(*arguments: Any, **settings: Any) -> None:
        target = next(argument for argument in arguments if isinstance(argument, Path))
        target.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(q_nn.save, failing, full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make_llama(seed=1), tmp_path)
    assert files(tmp_path) == before
    assert name in before


KILL = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from q_nn import load_into, save_pretrained
torch.set_num_threads(1)

class Config:
    def __init__(self, value): self.value = value
    def to_json_string(self): return '{"value": %d}' % self.value

def make(value):
    model = nn.Sequential(nn.Linear(200, 300))
    model.config = Config(value)
    with torch.no_grad(): model[0].weight.fill_(value); model[0].bias.fill_(value)
    return model

directory, models = Path(sys.argv[1]), [make(0), make(1)]
save_pretrained(models[0], directory)
random.seed(0)
for trial in range(25):
    child = os.fork()
    if not child:
        while True:
            for model in models: save_pretrained(model, directory)
    time.sleep(random.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = make(9)
    load_into(loaded, directory)
    values = {float(p.min()) for p in loaded.parameters()} | {float(p.max()) for p in loaded.parameters()}
    assert values in ({0.0}, {1.0}), values

for partial in directory.glob(".*.partial"): partial.unlink()
before = {path.name: path.read_bytes() for path in directory.iterdir()}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    save_pretrained(models[1], directory)
except OSError as error:
    assert "model.safetensors" in str(error)
else:
    raise AssertionError("a file beyond the limit was written")
assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
"""


def test_killed_or_out_of_space(tmp_path: Path) -> None:
    """A process killed at any moment of a save leaves a model, the old or the new one; so does one that can't write its file."""
    subprocess.run([sys.executable, "-c", KILL, str(tmp_path)], check=True, timeout=100)


def test_what_cannot_be_saved(make_llama: MakeLlama, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no transformers config"):
        save_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    model = make_llama()
    add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="merge_lora"):
        save_pretrained(model, tmp_path)
    model = make_llama()
    quantize(model, QConfig("int8", skip=("lm_head", ".*self_attn")))
    quantize(model, QConfig("nf4"))
    with pytest.raises(ValueError, match="one kind only"):
        save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        save_pretrained(make_llama().to("meta"), tmp_path)
    assert not files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="several files"):
        save_pretrained(make_llama(), tmp_path)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no directory": (lambda d: [p.unlink() for p in d.iterdir()], FileNotFoundError, "config.json: no such file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors: no such file"),
    "no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"\x80pickle"), ValueError, "is not a safetensors file"),
    "no json": (lambda d: (d / "config.json").write_text("{"), ValueError, "is not JSON"),
    "no object": (lambda d: (d / "config.json").write_text("[]"), ValueError, "expected an object"),
    "missing": (lambda d: rewrite(d, lambda s: s.pop("model.norm.weight")), ValueError, "missing keys: model.norm.weight"),
    "unexpected": (lambda d: rewrite(d, lambda s: s.update(extra=torch.ones(2))), ValueError, "unexpected keys: extra"),
    "shape": (lambda d: rewrite(d, lambda s: s.update({"model.norm.weight": torch.ones(3)})), ValueError, "norm.weight has shape"),
    "absmax": (lambda d: rewrite(d, lambda s: s.pop(f"{UP}.absmax")), ValueError, f"{UP}.absmax is missing"),
    "dense": (
        lambda d: (d / "config.json").write_text("{}"),
        ValueError,
        r"q_proj.weight is quantized, but config.json doesn't say so",
    ),
    "unknown key": (
        lambda d: (d / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}'),
        ValueError,
        r"unknown keys \['bits'\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_directories_change_nothing(make_llama: MakeLlama, ids: Tensor, tmp_path: Path, damage: str) -> None:
    model = make_llama()
    quantize(model, QConfig())
    save_pretrained(model, tmp_path)
    spoil, error, message = DAMAGE[damage]
    spoil(tmp_path)
    other = make_llama(seed=1)
    before = logits(other, ids)
    with pytest.raises(error, match=message):
        load_into(other, tmp_path)
    assert torch.equal(logits(other, ids), before)
    assert not any(isinstance(module, LinearNF4) for module in other.modules())


def test_several_files(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    quantize(model, QConfig())
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {key: f"model-{index % 2}.safetensors" for index, key in enumerate(state)}
    for name in set(weight_map.values()):
        save_file({key: tensor for key, tensor in state.items() if weight_map[key] == name}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    other = make_llama(seed=1)
    load_into(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="in the same directory"):
        load_into(make_llama(), tmp_path)


FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def test_replace_linears_chooses_as_transformers_does(make_llama: MakeLlama) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    for tied in (False, True):
        for skip in (None, [], ["lm_head"], ["layers.1", "up_proj"], [r"model\.layers\.0"]):
            theirs = make_llama(tied=tied)
            config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
            replace_with_bnb_linear(theirs, HfQuantizer.get_modules_to_not_convert(theirs, skip), config)
            expected = [name for name, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"]
            if tied:  # they would quantize the head of a tied model, and untie it
                expected = [name for name in expected if name != "lm_head"]
            assert list(replace_linears(make_llama(tied=tied), FOUR | {"llm_int8_skip_modules": skip})) == expected


def test_replace_linears_makes_the_right_layers() -> None:
    class Own(nn.Linear):
        """A class that may compute something else."""

    def swapped(config: dict[str, Any], **settings: Any) -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 32, device="meta"), Own(32, 32), nn.LayerNorm(32))
        replace_linears(model, config, **settings)
        return model

    assert type(swapped(FOUR)[0]) is LinearFP4
    model = swapped(FOUR | {"bnb_4bit_quant_type": "nf4"}, linear_types=(nn.Linear, Own))
    assert [type(layer) for layer in model] == [LinearNF4, LinearNF4, nn.LayerNorm]
    assert model[0].weight.is_meta
    for threshold, activations in ((0.0, "int8"), (6.0, "native")):
        layer = swapped(EIGHT | {"llm_int8_threshold": threshold})[0]
        assert isinstance(layer, Linear8bitLt)
        assert layer.activations == activations


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({}, "quant_method is None"),
        (FOUR | {"load_in_8bit": True}, "expected one of them"),
        ({"quant_method": "bitsandbytes"}, "expected one of them"),
        (FOUR | {"group_size": 128}, r"unknown keys \['group_size'\]"),
        (FOUR | {"load_in_4bit": 1}, "load_in_4bit is 1"),
        (FOUR | {"bnb_4bit_quant_type": "int4"}, "quant_type is 'int4'"),
        (EIGHT | {"llm_int8_threshold": -1}, "llm_int8_threshold is -1"),
        (EIGHT | {"llm_int8_threshold": "6"}, "llm_int8_threshold is '6'"),
        (EIGHT | {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
        (FOUR | {"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
        (FOUR | {"llm_int8_skip_modules": ["("]}, "llm_int8_skip_modules"),
        (FOUR | {"llm_int8_skip_modules": [3]}, "llm_int8_skip_modules"),
    ],
)
def test_replace_linears_refuses_what_it_does_not_know(config: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    with pytest.raises((TypeError, ValueError), match=message):
        replace_linears(model, config)
    assert type(model[0]) is nn.Linear
