"""Estimates from a config.json against the real bytes of real models, gradients, optimizers and caches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
)

import q_optim
from q_core import ops
from q_nn import LoRAConfig, QConfig, add_lora, estimate, quantize, save_pretrained, weight_bytes
from q_nn.cli import main
from q_nn.kv_cache import KV_DTYPES, KVCache, kv_cache_of
from q_nn.optimizer_states import OPTIMIZERS
from q_nn.rules import FORMATS

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
}


def make(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Path]:
    def write(config: Any, **fields: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(config.to_json_string()), **fields}))
        return path

    return write


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_in_every_format(config_of: Callable[..., Path], name: str, dtype: torch.dtype) -> None:
    found = estimate(config_of(CONFIGS[name](), dtype=str(dtype).removeprefix("torch.")))
    expected = {str(dtype).removeprefix("torch."): weight_bytes(make(name, dtype))}
    for format in FORMATS:
        if format != "fp8" or name == "mixtral":  # which is for experts only
            model = make(name, dtype)
            quantize(model, QConfig(format))
            expected[format] = weight_bytes(model)
    assert found.weight_bytes == expected
    assert found.parameters == sum(parameter.numel() for parameter in make(name).parameters())
    assert found.architecture == type(make(name)).__name__


def test_the_dtype_that_is_asked_for_and_the_directory(tmp_path: Path) -> None:
    make("llama", torch.float32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    found = estimate(tmp_path, dtype=torch.bfloat16)
    assert found.weight_bytes["bfloat16"] == weight_bytes(make("llama"))


TRAINING: list[tuple[str, QConfig | None, int | None]] = [
    ("llama", None, None),
    ("tied llama", None, None),
    ("llama", QConfig("nf4", double_quant=False, skip=("lm_head", "down_proj")), None),
    ("llama", QConfig("nf4"), 64),
    ("llama", None, 5),
    ("mixtral", QConfig("nf4"), 64),
]


@pytest.mark.parametrize(("name", "config", "rank"), TRAINING, ids=str)
def test_training(config_of: Callable[..., Path], name: str, config: QConfig | None, rank: int | None) -> None:
    model = make(name)
    if config:
        quantize(model, config)
    if rank:
        add_lora(model, LoRAConfig(rank=rank))
    ids = torch.arange(160)[None]
    model.train()(ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    training = estimate(config_of(make(name).config), config, lora_rank=rank, optimizer="adamw8bit").training
    assert training.trainable == sum(parameter.numel() for parameter in trained)
    assert training.weight_bytes == weight_bytes(model)
    assert training.gradient_bytes == sum(p.grad.nbytes for p in trained if p.grad is not None)
    states = {}
    for bits, make_optimizer in ((32, q_optim.AdamW), (8, q_optim.AdamW8bit), (4, q_optim.AdamW4bit)):
        optimizer = make_optimizer(trained, lr=1e-4)
        optimizer.step()
        states[f"adamw, states in {bits} bits"] = q_optim.state_bytes(optimizer)
    assert training.state_bytes == states
    assert training.total_bytes == weight_bytes(model) + training.gradient_bytes + states["adamw, states in 8 bits"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_every_optimizer(config_of: Callable[..., Path], name: str) -> None:
    classes = {each.lower(): getattr(q_optim, each) for each in q_optim.__all__}
    model = make("llama", torch.float32)
    settings: dict[str, Any] = {"momentum": 0.9} if name.startswith(("sgd", "lars")) else {}
    optimizer = classes[name](model.parameters(), lr=1e-3, **settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    training = estimate(config_of(model.config, dtype="float32"), optimizer=name).training
    assert training.state_bytes[training.optimizer] == q_optim.state_bytes(optimizer)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_of_transformers(config_of: Callable[..., Path], name: str) -> None:
    model = make(name, torch.float32)
    cache = model(torch.arange(24).view(2, 12), past_key_values=DynamicCache(config=model.config)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = {kv.dtype: kv for kv in estimate(config_of(model.config), batch=2, length=12).kv_cache}  # type: ignore[union-attr]
    assert tuple(found) == KV_DTYPES
    assert found["float32"].batch_bytes == held == 2 * found["float32"].sequence_bytes == 24 * found["float32"].token_bytes
    assert found["bfloat16"].batch_bytes == found["float16"].batch_bytes == held // 2


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "fp8"])
def test_keys_and_values_of_the_surface(dtype: Any) -> None:
    """What write_kv takes for so many tokens in a layer."""
    T, G, D = 32, 2, 16
    held = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[dtype]
    caches = [torch.zeros(2, G, T // 2, D, dtype=held) for _ in range(2)]
    scales = [torch.zeros(2, G, T // 2) for _ in range(2)] if dtype != "bfloat16" else []
    k = torch.randn(T, G, D, dtype=torch.bfloat16)
    named = dict(zip(("k_scale_BGS", "v_scale_BGS"), scales, strict=False))
    ops.write_kv(k, k, *caches, torch.arange(T), **named)
    assert KVCache((None,), G, D).sequence_bytes(T, dtype) == sum(tensor.nbytes for tensor in (*caches, *scales))


def test_windows_and_layer_kinds() -> None:
    config = MistralConfig(**SIZES, sliding_window=8)
    cache = kv_cache_of(config)
    assert cache == KVCache((8, 8), 2, 16)
    assert cache.sequence_bytes(100, "bfloat16") == 8 * cache.token_bytes("bfloat16")
    config = Gemma2Config(**{**SIZES, "num_hidden_layers": 4}, head_dim=32, sliding_window=8)
    cache = kv_cache_of(config)
    assert cache == KVCache((8, None, 8, None), 2, 32)
    assert cache.sequence_bytes(100, "bfloat16") == (8 + 100 + 8 + 100) * cache.token_bytes("bfloat16") // 4


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DeepseekV3Config(), "kv_lora_rank is 512"),
        (MambaConfig(), "state_size is 16"),
        (Qwen3NextConfig(), "linear_num_key_heads is 16"),
        (T5Config(), "encoder and a decoder"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_caches_that_are_none_of_keys_and_values(config: Any, reason: str) -> None:
    found = kv_cache_of(config)
    assert isinstance(found, str)
    assert reason in found


def test_a_quantized_directory(tmp_path: Path) -> None:
    for config in (QConfig("nf4"), QConfig("int8")):
        model = make("llama")
        quantize(model, config)
        save_pretrained(model, tmp_path)
        assert estimate(tmp_path).weight_bytes == {"as it is": weight_bytes(model)}
    with pytest.raises(ValueError, match="quantized already"):
        estimate(tmp_path, QConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw9bit"}, "optimizer is 'adamw9bit'"),
        ({"optimizer": "lion4bit"}, "optimizer is 'lion4bit'"),
        ({"batch": 0}, "batch is 0"),
        ({"length": 1.5}, "length is 1.5"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"kv_dtypes": ("int4",)}, "kv_dtypes has 'int4'"),
        ({"config": QConfig(skip=("nobody",))}, "skip pattern 'nobody'"),
    ],
)
def test_what_means_nothing(config_of: Callable[..., Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(config_of(CONFIGS["llama"]()), **settings)


def test_the_command(config_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_of(make("llama").config)
    arguments = [
        "--format",
        "nf4",
        "--no-double-quant",
        "--lora-rank",
        "8",
        "--optimizer",
        "adamw8bit",
        "--batch",
        "3",
        "--length",
        "10",
    ]
    expected = estimate(path, QConfig("nf4", double_quant=False), lora_rank=8, optimizer="adamw8bit", batch=3, length=10)
    assert main(["estimate", str(path), *arguments]) == 0
    text = capsys.readouterr().out
    assert text == f"{expected}\n"
    for figure in (*expected.weight_bytes.values(), expected.training.total_bytes, expected.training.gradient_bytes):
        assert f"{figure:,}" in text
    assert main(["estimate", str(path), *arguments, "--json", "--kv-dtype", "int8", "--dtype", "float16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weight_bytes"]["nf4, as configured"] == expected.weight_bytes["nf4, as configured"]
    assert next(iter(found["weight_bytes"])) == "float16"
    assert [kv["dtype"] for kv in found["kv_cache"]] == ["int8"]
    for wrong, message in (
        (["estimate", str(path), "--rule", "x=nf4"], "give --format"),
        (["estimate", str(tmp_path / "none.json")], "no such file"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_the_package_needs_no_transformers_until_it_is_asked(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["transformers"] = None
import q_nn.cli
try:
    q_nn.cli.main(["--help"])
except SystemExit:
    pass
assert q_nn.cli.main(["estimate", sys.argv[1]]) == 2
"""
    (tmp_path / "config.json").write_text(LlamaConfig(**SIZES).to_json_string())
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert "usage: q-nn" in done.stdout
    assert "pip install 'q-nn[hf]'" in done.stderr
    assert done.returncode == 0
