"""Models quantized from directory to directory: the same files as from memory, whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import q_nn.disk
from q_nn import QConfig, QRule, load_into, quantize, save_pretrained
from q_nn.cli import main
from q_nn.disk import quantize_checkpoint

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DENSE = {"intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, **DENSE),
    "tied llama": lambda: LlamaConfig(**SIZES, **DENSE, tie_word_embeddings=True),
    "neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=96),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "mixtral": lambda: MixtralConfig(**SIZES, **DENSE, num_local_experts=4),
    "qwen3 moe": lambda: Qwen3MoeConfig(
        **SIZES, **DENSE, moe_intermediate_size=32, num_experts=12, num_experts_per_tok=2, head_dim=16, mlp_only_layers=[1]
    ),
}
QUANTIZE = [
    QConfig("nf4"),
    QConfig("fp4", blocksize=32, double_quant=False),
    QConfig("int8"),
    QConfig("nf4", skip=("lm_head", r".*\.0\.")),
]
EMBEDDINGS = QConfig("nf4", rules=(QRule(module_type="Embedding", format="nf4"), QRule("lm_head", "nf4")))
MIXED = QConfig("int8", threshold=0.0, rules=(QRule("experts", "nf4"), QRule(r".*\.1\.self_attn", "nf4", double_quant=False)))


def make(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()
    return model


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(("llama", config) for config in QUANTIZE),
        *(("tied llama", config) for config in QUANTIZE[:2]),
        *((name, QUANTIZE[0]) for name in ("neox", "opt", "mixtral", "qwen3 moe")),
        ("mixtral", QUANTIZE[2]),
        ("llama", EMBEDDINGS),
        ("tied llama", EMBEDDINGS),
        ("mixtral", MIXED),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_the_files_are_those_from_memory(tmp_path: Path, name: str, config: QConfig, size: str) -> None:
    make(name).save_pretrained(tmp_path / "in", max_shard_size="40KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    expected = quantize(model, config)
    save_pretrained(model, tmp_path / "memory", max_shard_size=size)
    report = quantize_checkpoint(tmp_path / "in", tmp_path / "disk", config, max_shard_size=size)
    assert report == expected
    assert files(tmp_path / "disk") == files(tmp_path / "memory")
    # In our dialect or in bitsandbytes', it loads, also into what is quantized already.
    loaded = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16).eval()
    ids = torch.arange(96)[None]
    for _ in range(2):
        load_into(loaded, tmp_path / "disk")
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert {n: type(m) for n, m in loaded.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("config", QUANTIZE[:3], ids=str)
def test_what_is_written_loads(tmp_path: Path, ids: Tensor, config: QConfig) -> None:
    make("llama", torch.float32).save_pretrained(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", config)
    model = make("llama", torch.float32)
    quantize(model, config)
    loaded = make("llama", torch.float32)
    load_into(loaded, tmp_path / "out")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # with bitsandbytes
    assert {name for name, layer in theirs.named_modules() if type(layer).__module__.startswith("bitsandbytes")} == {
        name for name, layer in model.named_modules() if type(layer) is not nn.Linear and isinstance(layer, nn.Linear)
    }


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_dense_experts_of_the_hub_load(tmp_path: Path, ids: Tensor, name: str) -> None:
    """transformers saves a tensor an expert, as the hub has them; they are stacked as they are read."""
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    keys = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(".experts.0." in key for key in keys)
    other = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    load_into(other, tmp_path)
    assert torch.equal(logits(other, ids), logits(model, ids))

    (shard,) = {file for key, file in keys.items() if ".experts.1." in key and "layers.0" in key and ("w2" in key or "down" in key)}
    state = load_file(tmp_path / shard)
    key = next(key for key in state if ".experts.1." in key and ("w2" in key or "down" in key))
    save_file({**state, key: state[key][:, :-1].contiguous()}, tmp_path / shard, metadata={"format": "pt"})
    before = logits(other, ids)
    with pytest.raises(ValueError, match=r"layers.0.*experts.down_proj can't be made of"):
        load_into(other, tmp_path)
    assert torch.equal(logits(other, ids), before)


def test_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    state = load_file(tmp_path / "in" / "model.safetensors")
    for key in state:
        if "norm" in key:
            state[key] = state[key].float()
    save_file(state, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", QConfig())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {written[key].dtype for key in written if "norm" in key} == {torch.float32}
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16
    description = json.loads(bytes(written["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert description["dtype"] == "bfloat16"


def test_other_files_are_copied_and_other_weights_not(tmp_path: Path) -> None:
    source = tmp_path / "in"
    make("llama").save_pretrained(source)
    for name in (
        "tokenizer.json",
        "README.md",
        "templates/tool.jinja",
        "pytorch_model.bin",
        "original/model.pth",
        ".cache/x",
        "a.gguf",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "tokenizer.model").symlink_to("tokenizer.json")  # as in the hub's cache
    quantize_checkpoint(source, tmp_path / "out", QConfig())
    copied = files(tmp_path / "out")
    model_files = {"config.json", "model.safetensors", "generation_config.json"}
    assert set(copied) - model_files == {"tokenizer.json", "tokenizer.model", "README.md", "templates/tool.jinja"}
    assert copied["generation_config.json"] == (source / "generation_config.json").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.model").is_symlink()
    assert not (tmp_path / "out" / "original").exists()


def rewritten(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def described(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "NaN to quantize": (
        lambda d: rewritten(d, lambda s: s[UP].view(-1)[3].fill_(float("nan"))),
        ValueError,
        UP.replace(".", r"\."),
    ),
    "NaN to keep": (lambda d: rewritten(d, lambda s: s[NORM][3].fill_(float("nan"))), ValueError, f"{NORM} has 1 elements"),
    "missing": (lambda d: rewritten(d, lambda s: s.pop(NORM)), ValueError, f"missing keys: {NORM}"),
    "unexpected": (lambda d: rewritten(d, lambda s: s.update(extra=torch.ones(1))), ValueError, "unexpected keys: extra"),
    "shape": (lambda d: rewritten(d, lambda s: s.update({UP: torch.ones(2, 2)})), ValueError, f"{UP} has shape"),
    "integers": (
        lambda d: rewritten(d, lambda s: s.update({NORM: torch.ones(64, dtype=torch.int32)})),
        ValueError,
        f"{NORM} has dtype",
    ),
    "quantized": (lambda d: described(d, quantization_config={"quant_method": "gptq"}), ValueError, "is quantized already"),
    "remote code": (lambda d: described(d, auto_map={"AutoModel": "x--y"}), ValueError, "auto_map asks for code"),
    "unknown model": (lambda d: described(d, architectures=["Nobody"]), ValueError, "expected a model class of transformers"),
    "no class": (lambda d: described(d, architectures=["set_seed"]), ValueError, "expected a model class of transformers"),
    "unknown type": (lambda d: described(d, model_type="nobody"), ValueError, "no model that transformers can build"),
    "sizes": (lambda d: described(d, hidden_size="many"), ValueError, "no model that transformers can build"),
    "dtype": (lambda d: described(d, dtype="int8"), ValueError, "dtype is 'int8'"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "expected weights in safetensors"),
    "nothing": (shutil.rmtree, FileNotFoundError, "config.json: no such file"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_leaves_nothing(tmp_path: Path, reason: str) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    spoil, error, message = REFUSED[reason]
    spoil(tmp_path / "in")
    with pytest.raises(error, match=message):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", QConfig(), max_shard_size="20KB")
    assert set(os.listdir(tmp_path)) <= {"in"}


def test_a_directory_with_files_is_not_written_into(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for target in (tmp_path / "out", tmp_path / "in", tmp_path / "in" / "config.json"):
        with pytest.raises(FileExistsError):
            quantize_checkpoint(tmp_path / "in", target, QConfig())
    assert os.listdir(tmp_path / "out") == ["mine"]


def test_buffers_that_were_saved_once_are_ignored(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    rewritten(tmp_path / "in", lambda state: state.update(old))
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", QConfig())
    load_into(make("llama"), tmp_path / "in")


def test_buffers_are_ignored_by_their_module(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("scale", torch.ones(2), persistent=False)

    (tmp_path / "config.json").write_text("{}")
    state = Model().state_dict()
    save_file({**state, "scale": torch.ones(2)}, tmp_path / "model.safetensors")
    load_into(Model(), tmp_path)
    save_file({**state, "linear.scale": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected keys: linear.scale"):
        load_into(Model(), tmp_path)


def test_killed_it_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    child = os.fork()
    if not child:
        count = 0
        original = q_nn.disk.ShardWriter.add

        def add(writer: Any, tensors: Any) -> None:
            nonlocal count
            count += 1
            if count == 10:
                os._exit(9)
            original(writer, tensors)

        q_nn.disk.ShardWriter.add = add  # type: ignore[method-assign]
        torch.set_num_threads(1)
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", QConfig("int8"), max_shard_size="10KB")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", QConfig("int8"))
    load_into(make("llama"), tmp_path / "out")


MEMORY = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from q_nn import QConfig, load_into, measure_peak
from q_nn.disk import quantize_checkpoint
from q_nn.meta_model import meta_model
torch.set_num_threads(1)
directory = Path(sys.argv[1])
sizes = dict(vocab_size=1024, hidden_size=256, intermediate_size=1024, num_attention_heads=4)
for layers, name in ((1, "warm"), (8, "in")):
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).save_pretrained(directory / name, max_shard_size="3MB")
quantize_checkpoint(directory / "warm", directory / "warm-out", QConfig("nf4"), max_shard_size="3MB")
with measure_peak("cpu") as memory:
    quantize_checkpoint(directory / "in", directory / "out", QConfig("nf4"), max_shard_size="3MB")
print(memory.added_bytes)
model = meta_model(directory / "in")
model.model.rotary_emb = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).model.rotary_emb
with measure_peak("cpu") as memory:
    load_into(model, directory / "in")
print(memory.added_bytes)
print(sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of a process's peak")
def test_peaks_of_memory(tmp_path: Path) -> None:
    """Quantizing takes a shard that is read, a tensor of it, and a shard that is written; loading the model once, and a shard."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], check=True, capture_output=True, text=True, timeout=200, env=environment
    )
    quantizing, loading, model = map(int, done.stdout.split()[-3:])
    assert model > 33e6
    assert quantizing < 18e6
    assert loading < model + 10e6


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("llama").save_pretrained(tmp_path / "in")
    arguments = [
        "quantize",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--format",
        "nf4",
        "--no-double-quant",
        "--blocksize",
        "128",
    ]
    assert main([*arguments, "--skip", "down_proj", "--rule", r".*\.0\.self_attn=none", "--max-shard-size", "30KB"]) == 0
    config = QConfig(
        "nf4", blocksize=128, double_quant=False, skip=("lm_head", "down_proj"), rules=(QRule(r".*\.0\.self_attn", None),)
    )
    report = quantize_checkpoint(tmp_path / "in", tmp_path / "again", config, max_shard_size="30KB")
    assert files(tmp_path / "out") == files(tmp_path / "again")
    assert capsys.readouterr().out == f"{report}\n"
    assert main([*arguments]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes_before"] == report.bytes_before
    for wrong in (["--rule", "x"], ["--rule", "x=nf5"], ["--rule", "(=nf4"], ["--format", "nf5"], ["--blocksize", "x"]):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
    assert main(["quantize", str(tmp_path / "in"), str(tmp_path / "no"), "--skip", "nobody"]) == 2
    assert "skip pattern 'nobody' means no module" in capsys.readouterr().err
