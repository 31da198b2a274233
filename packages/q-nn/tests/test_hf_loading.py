"""transformers quantizes while it loads, saves, and loads again, in real directories."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, pipeline

import q_nn.hf
import q_nn.hf.conversions
from q_core.formats.quantized_tensor import QuantizedTensor
from q_nn import LinearNF4, QConfig, QRule, load_into, quantize, weight_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
MakeLlama = Callable[..., LlamaForCausalLM]
CONFIGS = [QConfig("nf4"), QConfig("fp4", blocksize=32, double_quant=False), QConfig("int8"), QConfig(skip=("lm_head", "k_proj"))]
MIXED = QConfig("nf4", rules=(QRule(".*mlp", "fp4"), QRule("0.self_attn.v_proj", None)))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def alike(ours: nn.Module, other: nn.Module) -> None:
    """The same modules with the same parameters, bit for bit."""
    assert {n: type(m) for n, m in ours.named_modules()} == {n: type(m) for n, m in other.named_modules()}
    for (name, a), (other_name, b) in zip(ours.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name
        assert (a.dtype, type(a)) == (b.dtype, type(b)), name
        assert torch.equal(a, b), name


def settings(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_quantizing_while_loading_is_quantizing_after(
    make_llama: MakeLlama, ids: Tensor, tmp_path: Path, config: QConfig, tied: bool
) -> None:
    model = make_llama(tied=tied)
    model.save_pretrained(tmp_path / "dense")
    quantize(model, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    alike(loaded, model)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not loaded.training and loaded.is_quantized and loaded.hf_quantizer.is_trainable

    # What was saved is bitsandbytes' dialect: ours alone reads it here, the wheel in test_hf_bitsandbytes.
    loaded.save_pretrained(tmp_path / "quantized")
    assert settings(tmp_path / "quantized")["quant_method"] == "bitsandbytes"
    alike(q_nn.hf.from_pretrained(tmp_path / "quantized"), model)
    other = make_llama(tied=tied, seed=1)
    load_into(other, tmp_path / "quantized")
    alike(other, model)


def test_several_formats_go_there_and_back_in_our_dialect(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path / "dense")
    quantize(model, MIXED)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=MIXED)
    alike(loaded, model)
    loaded.save_pretrained(tmp_path / "quantized", max_shard_size="60KB")
    assert len([*(tmp_path / "quantized").glob("*.safetensors")]) > 1
    assert settings(tmp_path / "quantized") == {
        "quant_method": "q_nn",
        "format": "nf4",
        "blocksize": 64,
        "double_quant": True,
        "skip": [r"(?:model\.layers\.0\.self_attn\.v_proj|lm_head)$"],
        "rules": [
            {
                "pattern": r"(?:model\.layers\.\d+\.mlp\.gate_proj|model\.layers\.\d+\.mlp\.up_proj"
                r"|model\.layers\.\d+\.mlp\.down_proj)$",
                "format": "fp4",
                "blocksize": 64,
                "double_quant": True,
            }
        ],
    }
    for again in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantized"),
        q_nn.hf.from_pretrained(tmp_path / "quantized", device_map="cpu"),
    ):
        alike(again, model)
        assert torch.equal(logits(again, ids), logits(model, ids))
        again.save_pretrained(tmp_path / "again")  # what was loaded quantized is saved as well
        alike(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize(
    "config",
    [
        QConfig("int4"),
        QConfig("mxfp4"),
        QConfig("nvfp4"),
        QConfig("int8", threshold=3.0, rules=(QRule(".*mlp", "int8_weight_only"), QRule(".*embed_tokens", "nf4"))),
        QConfig(skip=(), rules=(QRule(".*embed_tokens|lm_head", "fp4"),)),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_format_goes_there_and_back(make_llama: MakeLlama, ids: Tensor, tmp_path: Path, config: QConfig, tied: bool) -> None:
    model = make_llama(tied=tied)
    model.save_pretrained(tmp_path / "dense")
    quantize(model, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    alike(loaded, model)
    loaded.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    alike(again, model)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    load_into(other := make_llama(tied=tied, seed=1), tmp_path / "quantized")
    alike(other, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype(make_llama: MakeLlama, tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    quantize(model, MIXED)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=MIXED, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    loaded.save_pretrained(tmp_path / "quantized")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").dtype == dtype  # as config.json says
    for other in (torch.float32, torch.bfloat16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=other)
        assert {parameter.dtype for parameter in again.parameters()} == {other}
    if dtype == torch.bfloat16:
        alike(loaded, model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": torch.device("cpu")}, None], ids=str)
def test_device_map(make_llama: MakeLlama, ids: Tensor, tmp_path: Path, device_map: Any) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path)
    quantize(model, QConfig())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QConfig(), device_map=device_map, max_memory={"cpu": "1GB"}
    )
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}, {"model": "cpu", "lm_head": 0}], ids=str)
def test_offloading_is_refused(make_llama: MakeLlama, tmp_path: Path, device_map: Any) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="can't be offloaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QConfig(), device_map=device_map)


def test_auto_shares_a_model_out_by_its_quantized_size(make_llama: MakeLlama, tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path)
    quantize(model, QConfig())
    limit = round(weight_bytes(model) * 1.3)
    arguments: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": limit}, "offload_folder": tmp_path / "offload"}
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)
    assert "disk" in dense.hf_device_map.values()
    alike(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QConfig(), **arguments), model)
    with pytest.raises(ValueError, match="can't be offloaded"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=QConfig(), **{**arguments, "max_memory": {"cpu": limit // 3}}
        )


def test_no_two_weights_are_dense_at_a_time(make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="200KB")
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    original = QuantizedTensor.quantize

    def watched(dense: Tensor, format: Any) -> QuantizedTensor:
        nonlocal most
        alive.append(weakref.ref(dense))
        most = max(most, sum(reference() is not None for reference in alive))
        return original(dense, format)

    monkeypatch.setattr(QuantizedTensor, "quantize", watched)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QConfig())
    assert len(alive) == 14
    assert most == 1


def test_generation_and_pipelines(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path)
    quantize(model, QConfig())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QConfig())
    new = loaded.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(new, model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    text = pipeline("text-generation", model=loaded, tokenizer=tokenizer)("w3 w4", max_new_tokens=3, do_sample=False)
    assert re.fullmatch(r"w3 w4( ?w\d+){3}", text[0]["generated_text"])


def test_dequantize(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=QConfig())
    expected = logits(model, ids)
    model.dequantize()
    assert not any(isinstance(parameter, QuantizedTensor) for parameter in model.parameters())
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(logits(model, ids), expected)
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), ids), expected)


def test_other_classes_of_the_same_model(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    """The body without a head, and with another one, which starts dense."""
    make_llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=QConfig())
    model.save_pretrained(tmp_path / "quantized")
    for arguments in ({"quantization_config": QConfig()}, {}):
        source = tmp_path / ("dense" if arguments else "quantized")
        body = q_nn.hf.from_pretrained(source, auto_class=AutoModel, **arguments)
        alike(body, model.model)
        classifier = q_nn.hf.from_pretrained(source, auto_class=AutoModelForSequenceClassification, num_labels=3, **arguments)
        alike(classifier.model, model.model)
        assert classifier.score.out_features == 3
        assert type(classifier.score) is nn.Linear and not isinstance(classifier.score.weight, QuantizedTensor)


def test_a_model_quantized_in_place_is_adopted(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    with pytest.raises(ValueError, match="no weight is a QuantizedTensor"):
        q_nn.hf.adopt(model)
    quantize(model, MIXED)
    assert q_nn.hf.adopt(model) is model
    model.save_pretrained(tmp_path)
    alike(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    expected = logits(model, ids)
    torch.testing.assert_close(logits(model.dequantize(), ids), expected)
    with pytest.raises(TypeError, match="adopt: model is Linear"):
        q_nn.hf.adopt(nn.Linear(4, 4))  # type: ignore[arg-type]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_dtypes_that_weights_cannot_decode_to(make_llama: MakeLlama, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dtype is torch.float64, expected one of"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QConfig(), dtype=torch.float64)


def test_rules_that_mean_nothing_are_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QConfig(rules=(QRule("nowhere", "fp4"),)))


def test_quantizing_what_is_quantized_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    model = make_llama()
    quantize(model, QConfig())
    q_nn.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"is quantized already \(bitsandbytes\); leave out quantization_config"):
        q_nn.hf.from_pretrained(tmp_path, quantization_config=QConfig())


def _damage(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    key = "model.layers.0.mlp.up_proj.weight"
    state_key = f"{key}.quant_state.bitsandbytes__fp4"

    def missing(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors[f"{key}.absmax"]

    def lying(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        text = bytes(tensors[state_key].tolist()).replace(b"[192, 128]", b"[128, 192]")
        tensors[state_key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def dense(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for part in [part for part in tensors if part.startswith(key)]:
            del tensors[part]
        tensors[key] = torch.zeros(192, 128)

    def unsaid(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"]["skip"].append("q_proj")

    def unsaid_int8(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for layer in (0, 1):
            query = f"model.layers.{layer}.self_attn.q_proj.weight"
            for part in [part for part in tensors if part.startswith(query)]:
                del tensors[part]
            tensors[query] = torch.zeros(128, 128, dtype=torch.int8)
        config["quantization_config"]["skip"].append("q_proj")

    def unknown_key(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"]["bits"] = 3

    found: Callable[[dict[str, Tensor], dict[str, Any]], None] = locals()[name]
    return found


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "absmax is missing"),
        ("lying", "shape"),
        ("dense", "says that it is quantized"),
        ("unsaid", "q_proj.weight *\\| MISMATCH"),
        ("unsaid_int8", "holds model.layers.0.self_attn.q_proj.weight quantized, as torch.int8, but config.json doesn't say so"),
        ("unknown_key", r"unknown keys \['bits'\]"),
    ],
)
def test_damaged_directories(
    make_llama: MakeLlama, tmp_path: Path, damage: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_llama()
    quantize(model, MIXED)
    q_nn.hf.adopt(model).save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    _damage(damage)(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    # transformers collects what goes wrong with single weights in a report, and raises when it is through.
    assert re.search(message, str(caught.value) + caplog.text)


def test_weights_that_are_not_finite(make_llama: MakeLlama, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QConfig())
    assert "model.layers.1.mlp.down_proj.weight" in caplog.text and "NaN or infinite" in caplog.text


# --- in a process of its own --------------------------------------------------------------------------------------------


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_q_nn_imports_neither_transformers_nor_peft() -> None:
    code = """
import sys
import q_nn
assert q_nn.QConfig().quant_method == "q_nn"
assert not {"transformers", "peft", "accelerate"} & set(sys.modules)
sys.modules["transformers"] = None  # as if it weren't installed
try:
    import q_nn.hf
except ImportError as error:
    print(error)
"""
    assert "pip install 'q-nn[hf]'" in run(code)


def test_a_fresh_process_reads_our_dialect_without_bitsandbytes(make_llama: MakeLlama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    quantize(model, MIXED)
    q_nn.hf.adopt(model).save_pretrained(tmp_path / "ours")
    quantize(other := make_llama(), QConfig())
    q_nn.save_pretrained(other, tmp_path / "theirs")
    save_file({"ids": ids, "ours": logits(model, ids), "theirs": logits(other, ids)}, tmp_path / "expected")
    code = """
import sys
sys.modules["bitsandbytes"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file(sys.argv[1] + "/expected")
def check(model, name):
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected[name]), name
try:  # without us there is no model
    AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/ours")
    raise SystemExit("loaded")
except RuntimeError:
    assert "q_nn" not in sys.modules
import q_nn.hf
check(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/ours"), "ours")
check(q_nn.hf.from_pretrained(sys.argv[1] + "/theirs"), "theirs")
q_nn.hf.serve_bitsandbytes()
check(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/theirs"), "theirs")
"""
    run(code, tmp_path)


def test_hooks_of_accelerate_move_with_the_modules() -> None:
    """Where a model is shared out among devices, they bring inputs along; they are there before our modules are."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    from q_nn.hf.hooks import move_hook

    class Doubling(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: nn.Module, *inputs: Tensor, **named: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
            return tuple(2 * tensor for tensor in inputs), named

    old, x = nn.Linear(64, 8), torch.randn(3, 64)
    new = LinearNF4.from_linear(old)
    expected = new(2 * x)
    move_hook(old, new)
    assert not torch.equal(new(x), expected)
    add_hook_to_module(old, Doubling())
    move_hook(old, new)
    assert torch.equal(new(x), expected)
    assert torch.equal(old(x), nn.functional.linear(x, old.weight, old.bias))
