"""What can't be served is refused by name, before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from q_serve.build import build
from q_serve.core.request import Request
from q_serve.core.sampling import SamplingParams
from q_serve.errors import ModelError
from q_serve.models.registry import MODELS, read_config
from q_serve.options import EngineOptions


@pytest.fixture
def directory(tiny_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_directory, tmp_path / "model"))


def edit(directory: Path, changes: dict[str, Any], file: str = "config.json") -> None:
    config = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(config | changes))


def refused(directory: Path, message: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=message):
        build(EngineOptions(model=directory, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture 'GPT2LMHeadModel' is not supported; q-serve serves LlamaForCausalLM",
        ),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": []}, r"architectures is \[\]"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 15}, "head_dim is 15, expected an even number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor is None"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, "--max-model-len 128"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64}, "sliding_window is 64"),
        ({"vocab_size": 100}, "tokenizer.json has 320 tokens"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_configurations(directory: Path, changes: dict[str, Any], message: str) -> None:
    edit(directory, changes)
    (directory / "generation_config.json").unlink()
    refused(directory, message)


def test_older_keys_mean_the_same(directory: Path, tiny_llama: LlamaForCausalLM) -> None:
    """As transformers 4 wrote them."""
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"], config["dtype"], config["head_dim"]
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32", "some_tool_s_note": "x"}
    (directory / "config.json").write_text(json.dumps(config))
    engine = build(EngineOptions(model=directory)).engine
    prompt = list(range(40, 60))
    request = Request("r", list(prompt), SamplingParams(max_tokens=12, temperature=0))
    engine.add(request)
    while engine.has_work:
        engine.step()
    with torch.no_grad():
        expected = tiny_llama.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert request.tokens == expected[0].tolist()


def test_files_that_are_no_model(directory: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: not a directory")
    refused(directory / "config.json", "not a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    (directory / "config.json").write_text("[" * 100_000)
    refused(directory, r"config\.json: not JSON")
    (directory / "config.json").write_text("[]")
    refused(directory, r"config\.json: a JSON list, expected an object")
    (directory / "config.json").write_bytes(b"\xff")
    refused(directory, r"config\.json: not JSON")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nonsense"}, "device 'nonsense' can't be used"),
        ({"max_model_len": 1024}, "the model was made for 512"),
        ({"max_model_len": 512, "num_blocks": 4}, "holds 64 tokens"),
        ({"kv_cache_memory": 100}, "one block of 16 tokens needs 8192"),
        ({"num_blocks": 1 << 40}, "a KV cache of 9007199254740992 bytes can't be had on cpu"),
    ],
)
def test_options_that_do_not_fit(directory: Path, options: dict[str, Any], message: str) -> None:
    refused(directory, message, **options)


def test_a_small_cache_cuts_the_context(directory: Path) -> None:
    assert build(EngineOptions(model=directory, num_blocks=4)).max_model_len == 64


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["llama3", "silu"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "x"]), inner),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_configuration_crashes_the_reader(data: st.DataObject, directory: Path, tiny_directory: Path) -> None:
    config = json.loads((tiny_directory / "config.json").read_text())
    keys = [*config, "rope_scaling", "quantization_config", "sliding_window", "layer_types", "auto_map"]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), json_values, max_size=3))
    architecture = data.draw(st.sampled_from(sorted(MODELS)))
    (directory / "config.json").write_text(json.dumps(config | {"architectures": [architecture]} | changes))
    with contextlib.suppress(ModelError):
        read_config(directory)


# --- weights ----------------------------------------------------------------------------------------------------------


def rewrite(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_weights_that_do_not_fit(directory: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    rewrite(directory, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    refused(directory, rf"model\.safetensors: {name} has shape \[5, 64\], expected \[96, 64\]")
    rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(96, 64, dtype=torch.int8)}))
    refused(directory, rf"model\.safetensors: {name} has dtype I8")
    rewrite(directory, lambda tensors: tensors.pop(name))
    refused(directory, f"the weights lack {name}")
    rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(96, 64), "model.extra": torch.zeros(1)}))
    refused(directory, r"model\.safetensors: the model has no place for model\.extra")


def test_broken_weight_files(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for broken in (b"", data[:100], data[: len(data) // 2], b"\xff" * 8 + data[8:], data[:8] + b"[" + data[9:]):
        path.write_bytes(broken)
        refused(directory, r"model\.safetensors: not a safetensors file")
    path.unlink()
    refused(directory, r"neither model\.safetensors nor model\.safetensors\.index\.json")


def shard(directory: Path) -> dict[str, str]:
    """Split the weights in two files and an index; the index's map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"one.safetensors": names[:10], "two.safetensors": names[10:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards(directory: Path) -> None:
    dense = build(EngineOptions(model=directory)).engine._runner.model.state_dict()  # type: ignore[attr-defined]
    weight_map = shard(directory)
    sharded = build(EngineOptions(model=directory)).engine._runner.model.state_dict()  # type: ignore[attr-defined]
    assert dense.keys() == sharded.keys() and all(torch.equal(dense[name], sharded[name]) for name in dense)

    def index(changes: dict[str, str]) -> None:
        edit(directory, {"weight_map": weight_map | changes}, "model.safetensors.index.json")

    index({"lm_head.weight": "../one.safetensors"})
    refused(directory, r"names '\.\./one\.safetensors', expected a \.safetensors file beside the index")
    index({"lm_head.weight": "/etc/passwd"})
    refused(directory, "names '/etc/passwd'")
    index({"lm_head.weight": "three.safetensors"})
    refused(directory, r"names three\.safetensors, which is missing")
    index({"lm_head.weight": "two.safetensors"})
    refused(directory, r"says that two\.safetensors holds lm_head\.weight")
    edit(directory, {"weight_map": {}}, "model.safetensors.index.json")
    refused(directory, "weight_map is missing or empty")


def test_tied_weights_may_be_repeated_but_not_differ(directory: Path) -> None:
    edit(directory, {"tie_word_embeddings": True})
    refused(directory, r"lm_head\.weight differs from model\.embed_tokens\.weight")
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    build(EngineOptions(model=directory))
    rewrite(directory, lambda tensors: tensors.pop("lm_head.weight"))
    model = build(EngineOptions(model=directory)).engine._runner.model  # type: ignore[attr-defined]
    assert model.lm_head.weight is model.model.embed_tokens.weight
