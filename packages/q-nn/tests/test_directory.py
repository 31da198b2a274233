"""Hugging Face directories: saved whole or not at all, loaded strictly.

Long, because of the many ways in which a directory can be wrong, each beside the message it gets.
"""

from __future__ import annotations

import errno
import json
import random
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
import q_nn.shards
from q_nn import (
    Linear8bitLt,
    LinearFP4,
    LinearInt8,
    LinearNF4,
    LoRAConfig,
    QConfig,
    add_lora,
    load_into,
    prepare,
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


def test_several_formats_are_said_in_our_own_dialect(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama(dtype=torch.bfloat16)
    quantize(model, QConfig("int8", skip=("lm_head", ".*self_attn")))
    quantize(model, QConfig("nf4"))
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "q_nn"
    other = make_llama(dtype=torch.bfloat16, seed=1)
    load_into(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))


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


@pytest.mark.parametrize("failing", [(q_nn.shards, "save_file"), (q_nn.save, "write_json")], ids=lambda failing: failing[1])
def test_a_failed_save_leaves_the_old_files(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[Any, str]
) -> None:
    save_pretrained(make_llama(), tmp_path)
    before = files(tmp_path)

    def full(*arguments: Any, **settings: Any) -> None:
        target = next(argument for argument in arguments if isinstance(argument, Path))
        target.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*failing, full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make_llama(seed=1), tmp_path)
    assert files(tmp_path) == before


KILL = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from q_nn import load_into, save_pretrained
torch.set_num_threads(1)

class Config:
    def __init__(self, value): self.value = value
    def to_json_string(self): return '{"value": %d}' % self.value

def make(value):
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(200, 200))
    model.config = Config(value)
    with torch.no_grad():
        for parameter in model.parameters(): parameter.fill_(value)
    return model

directory, models = Path(sys.argv[1]), [make(0), make(1)]
save_pretrained(models[0], directory)
random.seed(0)
for trial in range(12):
    child = os.fork()
    if not child:
        while True:
            for model, size in zip(models, (10**9, 100_000)): save_pretrained(model, directory, max_shard_size=size)
    time.sleep(random.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = make(9)
    load_into(loaded, directory)
    values = {float(p.min()) for p in loaded.parameters()} | {float(p.max()) for p in loaded.parameters()}
    assert values in ({0.0}, {1.0}), values
    assert {json.loads((directory / "config.json").read_text())["value"]} == values

save_pretrained(models[0], directory, max_shard_size=200_000)
assert sorted(os.listdir(directory)) == ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                                         "model.safetensors.index.json"]
before = {path.name: path.read_bytes() for path in directory.iterdir()}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    save_pretrained(models[1], directory)
except OSError as error:
    assert "safetensors" in str(error)
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
    with pytest.raises(ValueError, match="meta device"):
        save_pretrained(make_llama().to("meta"), tmp_path)
    for size in (0, -1, "", "5XB", "0GB", "GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            save_pretrained(make_llama(), tmp_path, max_shard_size=size)
    for kind in (True, 1.5, None):
        with pytest.raises(TypeError, match="max_shard_size"):
            save_pretrained(make_llama(), tmp_path, max_shard_size=kind)  # type: ignore[arg-type]
    assert not files(tmp_path)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


UP = "model.layers.0.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def said(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what a weight says of itself."""

    def spoil(directory: Path) -> None:
        def rewritten(state: dict[str, Tensor]) -> None:
            description = json.loads(bytes(state[STATE].tolist()))
            change(description)
            state[STATE] = torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)

        rewrite(directory, rewritten)

    return spoil


def filled(key: str, value: float) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda state: state[key].view(-1)[-1:].fill_(value))


NAN = float("nan")
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
    "truncated": (lambda d: cut(d / "model.safetensors"), ValueError, "model.safetensors is not a safetensors file"),
    "says a shape": (said(lambda s: s.update(shape=[128, 192])), ValueError, f"{UP} has shape .128, 192., expected .192, 128."),
    "says more": (said(lambda s: s.update(shape=[10**9, 10**9])), ValueError, f"{UP} is uint8"),
    "says a block": (said(lambda s: s.update(blocksize=128)), ValueError, f"{UP}.absmax is uint8 .384., expected uint8 .192."),
    "says another block": (said(lambda s: s.update(blocksize=63)), ValueError, "says blocksize 63"),
    "says a type": (said(lambda s: s.update(quant_type="fp4")), ValueError, "says quant_type 'fp4'"),
    "says NaN": (said(lambda s: s.update(nested_offset=NAN)), ValueError, "nested_offset nan"),
    "unknown format": (
        lambda d: rewrite(d, lambda s: s.update({f"{UP}.quant_state.bitsandbytes__nf3": s.pop(STATE)})),
        ValueError,
        r"up_proj.weight has dtype uint8|unexpected keys",
    ),
    "NaN scales": (filled(f"{UP}.nested_absmax", NAN), ValueError, f"{UP}.nested_absmax has 1 scales that are NaN"),
    "NaN weight": (filled("model.norm.weight", NAN), ValueError, "model.norm.weight has 1 elements that are NaN"),
    "infinite weight": (filled("lm_head.weight", float("inf")), ValueError, "lm_head.weight has 1 elements that are NaN or inf"),
    "integers": (
        lambda d: rewrite(d, lambda s: s.update({"model.norm.weight": torch.ones(128, dtype=torch.int32)})),
        ValueError,
        "norm.weight has dtype int32",
    ),
    "unknown key": (
        lambda d: (d / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}'),
        ValueError,
        r"unknown keys \['bits'\]",
    ),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


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


def test_int8_of_weights_alone_comes_back_as_it_was(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    """bitsandbytes' dialect would make LLM.int8() of it."""
    model = make_llama()
    quantize(model, QConfig("int8_weight_only"))
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "q_nn"
    other = make_llama(seed=1)
    load_into(other, tmp_path)
    assert sum(type(module) is LinearInt8 for module in other.modules()) == 14
    assert torch.equal(logits(other, ids), logits(model, ids))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


@pytest.mark.parametrize("config", [None, *CONFIGS[:3]], ids=str)
def test_several_files(make_llama: MakeLlama, ids: Tensor, tmp_path: Path, config: QConfig | None) -> None:
    model = make_llama()
    if config:
        quantize(model, config)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(model, tmp_path, max_shard_size="60KB")
    assert len(shards(tmp_path)) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    state = prepare(model).state_dict()
    assert {key: load_file(tmp_path / file)[key].tolist() for key, file in index["weight_map"].items()} == {
        key: tensor.tolist() for key, tensor in state.items()
    }
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    # What takes more than the limit is a module's: at most its tensors are in one file.
    largest = max(sum(t.nbytes for t in module.state_dict().values()) for module in model.modules() if not any(module.children()))
    assert all(sum(t.nbytes for t in load_file(path).values()) <= max(60_000, largest) for path in shards(tmp_path))

    other = make_llama(seed=1)
    load_into(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))
    # A save of another kind leaves nothing of it.
    save_pretrained(make_llama(seed=2), tmp_path)
    assert sorted(files(tmp_path)) == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    another = make_llama(seed=1)
    load_into(another, tmp_path)
    assert torch.equal(logits(another, ids), logits(make_llama(seed=2), ids))


def test_transformers_reads_several_files(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    save_pretrained(model, tmp_path, max_shard_size=100_000)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    other = make_llama(seed=1)
    load_into(other, tmp_path / "theirs")
    assert torch.equal(logits(other, ids), logits(model, ids))


def change_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


INDEX_DAMAGE: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "outside": (lambda d: change_index(d, lambda m: m.update(a="../elsewhere.safetensors")), ValueError, "in the same directory"),
    "absolute": (lambda d: change_index(d, lambda m: m.update(a="/etc/passwd")), ValueError, "in the same directory"),
    "parent": (lambda d: change_index(d, lambda m: m.update(a="..")), FileNotFoundError, "no such file"),
    "no string": (lambda d: change_index(d, lambda m: m.update(a=3)), ValueError, "expected file names"),
    "missing file": (lambda d: shards(d)[1].unlink(), FileNotFoundError, "00002-of-.*no such file"),
    "truncated file": (lambda d: cut(shards(d)[1]), ValueError, "00002-of-.* is not a safetensors file"),
    "exchanged": (lambda d: shards(d)[1].write_bytes(shards(d)[0].read_bytes()), ValueError, "which it says"),
    "not said": (
        lambda d: change_index(d, lambda m: m.pop("model.norm.weight")),
        ValueError,
        "'model.norm.weight' and 0 more that",
    ),
    "no map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), ValueError, "weight_map is NoneType"),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_damaged_indexes_change_nothing(make_llama: MakeLlama, ids: Tensor, tmp_path: Path, damage: str) -> None:
    save_pretrained(make_llama(), tmp_path, max_shard_size="100KB")
    spoil, error, message = INDEX_DAMAGE[damage]
    spoil(tmp_path)
    other = make_llama(seed=1)
    before = logits(other, ids)
    with pytest.raises(error, match=message):
        load_into(other, tmp_path)
    assert torch.equal(logits(other, ids), before)


class PlainConfig:
    """What save_pretrained wants of a config."""

    def to_json_string(self) -> str:
        return '{"model_type": "none"}'


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_fuzzed_files_raise_or_load(tmp_path: Path, name: str) -> None:
    """A byte that is another one, in what describes the weights: an error of the kinds that are promised, or a whole model."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 8))

    model = make()
    quantize(model, QConfig("nf4"))
    model.config = PlainConfig()  # type: ignore[assignment]
    save_pretrained(model, tmp_path, max_shard_size=4000)
    original = (tmp_path / name).read_bytes()
    described = len(original) if name.endswith(".json") else 8 + int.from_bytes(original[:8], "little")
    choose = random.Random(0)
    failed = 0
    for _ in range(150):
        damaged = bytearray(original)
        damaged[choose.randrange(described)] = choose.choice(b'\0"{}[],:0123459.xF\xff')
        (tmp_path / name).write_bytes(damaged)
        other = make()
        before = [parameter.clone() for parameter in other.parameters()]
        try:
            load_into(other, tmp_path)
        except (ValueError, TypeError, FileNotFoundError):
            failed += 1
            assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before, strict=True))
            assert all(type(module) is nn.Linear for module in other)
    assert failed > 30


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
    for settings, threshold, dense in (
        ({}, 6.0, False),
        ({"llm_int8_threshold": 0}, 0.0, False),
        ({"llm_int8_threshold": 2.5, "llm_int8_has_fp16_weight": True}, 2.5, True),
    ):
        layer = swapped(EIGHT | settings)[0]
        assert isinstance(layer, Linear8bitLt)
        assert (layer.threshold, layer.has_fp16_weights) == (threshold, dense)


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
        (FOUR | {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight is true, expected false with load_in_4bit"),
        (EIGHT | {"llm_int8_has_fp16_weight": 1}, "llm_int8_has_fp16_weight is 1"),
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
